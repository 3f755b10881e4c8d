"""Are zerocopy's metrics available at Ray's Prometheus endpoint? A test reads them from a cluster that exports them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import ray
from conftest import ORDINARY, run_python
from torch import nn

import zerocopy
from zerocopy._seeing import events, metrics

# The first connection of the process ends before metrics are read, so all figures are from the second connection.
SCRAPED = r"""
import json, re, sys, time, urllib.request, warnings
import ray, torch, zerocopy
from torch import nn
from zerocopy._seeing import metrics

NBYTES = 512 * 512 * 4

def connect():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init("local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False,
                 logging_level="ERROR", _system_config={"metrics_report_interval_ms": 1000})

@ray.remote(num_cpus=0.1)
class Reader:
    def __init__(self):
        metrics.SECONDS = 0.5
    def load(self, publication):
        self.publication, self.model = publication, publication.load()
    def write(self):
        with torch.no_grad():
            self.model.weight.add_(1)
    def refresh(self):
        return zerocopy.refresh(self.model)

def scraped():
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        return {}
    found = {}
    for metric, tags, value in re.findall(r"^ray_zerocopy_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if "le" not in tags:
            key = f"{metric} {tags['publication']}"
            found[key] = found.get(key, 0) + float(value)
    return found

connect()
zerocopy.publish(nn.Linear(8, 8)).load()
ray.shutdown()
connect()
model = nn.Linear(512, 512, bias=False)
publication = zerocopy.publish(model, name="search")
reader = Reader.remote()
ray.get(reader.load.remote(zerocopy.lookup("search")))
model.weight.data.mul_(2)
zerocopy.publish(model, name="search")
assert ray.get(reader.refresh.remote())
ray.get(reader.write.remote())
fallen_back = Reader.options(runtime_env={"py_executable": f"unshare --user --map-root-user {sys.executable}"}).remote()
ray.get(fallen_back.load.remote(zerocopy.publish(nn.Linear(8, 8))))

def is_there(found):
    wanted = ("shared_bytes search", "dirtied_bytes search", "refreshes_total search", "fallbacks_total ")
    return all(found.get(key) for key in wanted)

deadline, found = time.monotonic() + 60, {}
while not is_there(found) and time.monotonic() < deadline:
    time.sleep(0.5)
    found = scraped()
print(json.dumps(found))
ray.shutdown()
"""


@pytest.mark.long
def test_figures_are_scraped() -> None:
    """All counters and gauges have the right values, also on the second connection of a process."""
    done = run_python(SCRAPED, **ORDINARY)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    nbytes = 512 * 512 * 4
    assert found["publishes_total search"] == 2
    assert found["publish_seconds_count search"] == 2
    assert found["loads_total search"] == 2  # one load at arrival, one for the refresh
    assert found["load_seconds_count search"] == 2
    assert 0 < found["load_seconds_sum search"] < 30
    assert found["refreshes_total search"] == 1
    assert found["fallbacks_total "] == 1
    assert "fallbacks_total search" not in found
    assert nbytes <= found["shared_bytes search"] < nbytes + 65536
    assert nbytes <= found["dirtied_bytes search"] < nbytes + 65536
    assert (found["publications search"], found["versions search"]) == (1, 1)


def test_gauges_go_back_to_zero(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pipeline is dropped, its bytes no longer count in the gauges."""
    told = metrics.of_session()
    assert told is not None

    class Gone(nn.Linear):
        pass

    loaded = zerocopy.publish(Gone(64, 64)).load()
    told.set_gauges()
    before = metrics._figures()[""]
    assert (before[0] >= 64 * 64 * 4, before[2] >= 1, before[3]) == (True, True, 0)
    del loaded
    told.set_gauges()
    assert metrics._figures().get("", (0, 0, 0, 0))[0] < before[0]


def test_what_goes_wrong_there_reaches_nobody(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish, load and refresh succeed even if metrics cannot be written."""

    def fail() -> None:
        raise RuntimeError("no metrics")

    monkeypatch.setattr(metrics, "of_session", fail)
    publication = zerocopy.publish(nn.Linear(4, 4))
    assert publication.load().in_features == 4
    events.refreshed("name")


def test_a_forked_child_counts_nothing(cluster: None) -> None:
    """A forked child writes no metrics, because connection and thread belong to its parent."""
    import os

    assert metrics.of_session() is not None
    child = os.fork()
    if not child:
        os._exit(0 if metrics.of_session() is None and metrics._known is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ray.is_initialized()
