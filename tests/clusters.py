"""How do tests use several nodes on one machine? In a separate process, because the tests' process already has a cluster.

A file of checks runs as a program. It starts the nodes, calls its functions `check_...` in order, and reports for each whether it
held. A test then reads the result of each check.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import ray
from conftest import run_python
from ray.cluster_utils import Cluster

MB = 1 << 20


class Nodes:
    """The nodes. Each node's name is a resource, so that a task can request a node: `{"second": 1}`."""

    def __init__(self, store_bytes: dict[str, int], **settings: Any) -> None:
        """Start nodes with these names and store sizes in bytes. `settings` are settings of Ray."""
        self.cluster = Cluster()
        self.raylets = {}
        for name, nbytes in store_bytes.items():
            head = {} if self.raylets else {"include_dashboard": False, "_system_config": settings}
            self.raylets[name] = self.cluster.add_node(
                num_cpus=2, object_store_memory=nbytes, resources={name: 100}, **head
            )
        ray.init(self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def id_of(self, name: str) -> str:
        """The id of a node, by its name."""
        found: str = self.raylets[name].node_id
        return found

    def raylet(self, name: str) -> int:
        """The process id of a node's raylet."""
        (process,) = self.raylets[name].all_processes["raylet"]
        pid: int = process.process.pid
        return pid


def run(nodes: Nodes, checks: dict[str, Any]) -> None:
    """Call the checks of a program and print their results."""
    told = {}
    for name, check in list(checks.items()):
        if name.startswith("check_"):
            try:
                check(nodes)
                told[name] = "held"
            except BaseException:
                told[name] = traceback.format_exc()
    print(json.dumps(told), flush=True)
    ray.shutdown()
    nodes.cluster.shutdown()


def outcomes(file: str, **environment: str) -> Callable[[str], None]:
    """Run a file of checks. The returned function fails if the check with the given name did not hold."""
    done = run_python("", file, **environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith('{"check_'))
    )  # Ray may also print lines

    def held(check: str) -> None:
        assert told[check] == "held", told[check]

    return held
