"""What happens when the store and the disk are full, or weights were spilled to disk? No partial version is visible or stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ORDINARY, run_python
from reliability import read

pytestmark = pytest.mark.long

START = """
import gc, os, pathlib, sys, time, warnings
import numpy as np, ray, zerocopy
from conftest import bytes_in_store, wait_until
from reliability import fault
from versions import numbered
from zerocopy.errors import PublicationLostError, ZeroCopyError

KIND = "Store and disk"
FOLDER = pathlib.Path(sys.argv[1])
warnings.simplefilter("ignore")

def start(**settings):
    ray.init("local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", object_spilling_directory=str(FOLDER), _system_config=settings)

def files():
    return [path for path in FOLDER.rglob("*") if path.is_file()]

def fill(megabytes):
    return [ray.put(np.full(10_000_000, number, np.uint8)) for number in range(megabytes // 10)]
"""

SPILLED = """
start()
unnamed, named = zerocopy.publish(numbered(1, width=1500)), zerocopy.publish(numbered(2, width=1500), name="spilled")
filling = fill(90)
assert wait_until(lambda: sum(path.stat().st_size for path in files()) > 60_000_000)
with fault(KIND, "Weights were written to disk, because other objects filled the store; `load()`") as told:
    assert unnamed.load()() == 1
    assert zerocopy.lookup("spilled").load(verify=True)() == 2
    told.result = "the right answer, read from disk"
ray.shutdown()
"""

FULL = """
start(local_fs_capacity_threshold=0.0001)
held = fill(60)
mapped = ray.get(held)
publications, settled = [], bytes_in_store()

def is_right(search):
    return search() == search.number

for name in (None, "full"):
    search = numbered(1, width=1700)
    title = "under a name" if name else "without a name"
    with fault(KIND, f"Store and disk become full half-way through publishing {title}") as told:
        try:
            zerocopy.publish(search, name=name)
        except ZeroCopyError as error:
            told.result = f"`{type(error).__name__}`; no part of the publication remains"
        assert wait_until(lambda: bytes_in_store() <= settled, 12), bytes_in_store() - settled
    assert is_right(search)

search = numbered(1, width=1700)
with fault(KIND, "The same with `adopt=True`") as told:
    try:
        zerocopy.publish(search, adopt=True)
    except ZeroCopyError as error:
        told.result = f"`{type(error).__name__}`; the pipeline has its own memory again, and no part of the publication remains"
    assert wait_until(lambda: bytes_in_store() <= settled, 12), bytes_in_store() - settled
assert is_right(search)
assert zerocopy.publications().names == []
del mapped, held
gc.collect()
assert wait_until(lambda: bytes_in_store() == 0)
assert is_right(zerocopy.publish(search).load())
ray.shutdown()
"""


@pytest.mark.parametrize(("program", "rows"), [(SPILLED, 1), (FULL, 3)], ids=["written to disk", "full"])
def test_a_store(program: str, rows: int, tmp_path: Path) -> None:
    """Weights that Ray wrote to disk load correctly; a publication that finds store and disk full leaves nothing behind."""
    done = run_python(START + program, "-", str(tmp_path), **ORDINARY)
    assert len(read(done.stdout)) == rows, done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
