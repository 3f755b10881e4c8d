"""Messages of Ray that are lost: requests that do not arrive, replies that do not come back. Ray's own test switch loses them.

For each kind of message in turn: a publication of 20 MB is loaded by tasks and actors, all are dropped, and the store is empty
again. The same is done with plain `ray.put` and `ray.get`, so that one sees whose fault something is.
"""

from __future__ import annotations

import json

import pytest
from conftest import ORDINARY, run_python
from reliability import read

# The name of a call, and what it is for. https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/rpc/rpc_chaos.cc
CALLS = {
    "CoreWorkerService.grpc_client.PushTask": "tasks given to workers",
    "CoreWorkerService.grpc_client.PubsubLongPolling": "news of references that were dropped",
    "CoreWorkerService.grpc_client.PubsubCommandBatch": "subscriptions to such news",
    "CoreWorkerService.grpc_client.GetObjectStatus": "questions to owners",
    "CoreWorkerService.grpc_client.WaitForActorRefDeleted": "news of actor handles that were dropped",
    "NodeManagerService.grpc_client.RequestWorkerLease": "leases of workers",
    "NodeManagerService.grpc_client.ReturnWorkerLease": "workers given back",
    "NodeManagerService.grpc_client.PinObjectIDs": "objects pinned in the store",
}

PROGRAM = """
import gc, sys
import ray, zerocopy
from conftest import bytes_in_store, wait_until
from reliability import fault
from versions import Asked, ask, numbered

ray.init("local", num_cpus=2, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

def use(number, name):
    publication = zerocopy.publish(numbered(number, layers=5, width=1000), name=name)
    actors = [Asked.options(max_restarts=1, max_task_retries=2).remote(publication) for _ in range(2)]
    answers = [ask.options(max_retries=3).remote(publication) for _ in range(3)]
    assert ray.get([*answers, *(actor.ask.remote() for actor in actors)]) == [number] * 5
    if name:
        zerocopy.remove(name)

for number, name in enumerate([None, None, "named"], 1):
    what = f"{sys.argv[1]}; a publication {'with' if name else 'without'} a name, the {number}. in the program"
    with fault("Messages of Ray", what) as told:
        use(number, name)
        gc.collect()
        assert wait_until(lambda: bytes_in_store() < 1_000_000), bytes_in_store()
        told.result = "right answers of tasks and actors, and an empty store"
ray.shutdown()
"""
