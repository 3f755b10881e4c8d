"""Are answers right when Ray loses messages, that is, when requests do not arrive? Ray has a setting for such tests.

Each process loses the first two messages of each kind. During this, tasks and an actor load a publication of 20 MB, all
references are dropped, and the store must be empty again within the bound.
"""

from __future__ import annotations

import json

import pytest
from conftest import ORDINARY, run_python
from reliability import read

# https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/rpc/rpc_chaos.cc
CALLS = [
    "CoreWorkerService.grpc_client.PushTask",
    "CoreWorkerService.grpc_client.PubsubLongPolling",
    "CoreWorkerService.grpc_client.PubsubCommandBatch",
    "CoreWorkerService.grpc_client.GetObjectStatus",
    "CoreWorkerService.grpc_client.WaitForActorRefDeleted",
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "NodeManagerService.grpc_client.ReturnWorkerLease",
    "NodeManagerService.grpc_client.PinObjectIDs",
]

PROGRAM = """
import gc, sys, time
import ray, zerocopy
from conftest import bytes_in_store, wait_until
from reliability import fault
from versions import Asked, ask, numbered

options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init("local", num_cpus=2, object_store_memory=200_000_000, **options)

def use(number, name):
    publication = zerocopy.publish(numbered(number, layers=5, width=1000), name=name)
    actors = [Asked.options(max_restarts=1, max_task_retries=2).remote(publication) for _ in range(1)]
    answers = [ask.options(max_retries=3).remote(publication) for _ in range(2)]
    assert ray.get([*answers, *(actor.ask.remote() for actor in actors)]) == [number] * 3
    if name:
        zerocopy.remove(name)

for number, name in enumerate([None, "named"], 1):
    how = "with" if name else "without"
    with fault("Messages of Ray", f"{sys.argv[1]}; tasks and actors use a publication {how} a name") as told:
        use(number, name)
        told.happened_at(time.monotonic())
        gc.collect()
        assert wait_until(lambda: bytes_in_store() < 1_000_000), bytes_in_store()
        told.result = "right answers; seconds from dropping the last reference until the store is empty"
ray.shutdown()
"""


@pytest.mark.long
def test_requests_are_lost() -> None:
    """If Ray loses requests, answers are still right, and nothing stays in the store."""
    chances = {"req_failure_prob": 100, "resp_failure_prob": 0, "in_flight_failure_prob": 0}
    switch = json.dumps({call: {"num_failures": 2, **chances} for call in CALLS})
    done = run_python(PROGRAM, "-", "Ray loses requests", RAY_testing_rpc_failure=switch, **ORDINARY)
    assert len(read(done.stdout)) == 2, done.stderr[-3000:]
