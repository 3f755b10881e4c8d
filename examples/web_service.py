"""How do I serve a model over HTTP with several replicas that share one copy, and update it without downtime?

Bind `zerocopy.lookup(name)`, and publish under that name again. Needs zerocopy-ray[serve].

python examples/web_service.py
"""

import collections
import json
import logging
import socket
import threading
import urllib.request
from typing import Any

import ray
import torch
from ray import serve
from torch import nn

import zerocopy


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.1})
class Service:
    def __init__(self, model: zerocopy.Live[nn.Module]) -> None:
        self.model = model

    def __call__(self) -> dict[str, Any]:
        model = self.model.current()  # the newest version; this request uses it until its end
        with torch.inference_mode():
            score = model(torch.ones(1024)).mean().item()
        return {"score": score, "replica": serve.get_replica_context().replica_id.unique_id}


def publish(score: int) -> None:
    model = nn.Linear(1024, 1024, bias=False)  # your model, from its files; this one answers `score`
    nn.init.constant_(model.weight, score / 1024)
    zerocopy.publish(model, name="service")


def ask(port: int, answers: list[dict[str, Any]], ended: threading.Event) -> None:
    """A client that sends requests without pause. For a request that fails it stores an empty answer."""
    while not ended.is_set():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/score", timeout=30) as reply:
                answers.append(json.load(reply))
        except OSError:
            answers.append({})


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    publish(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Service.bind(zerocopy.lookup("service")), route_prefix="/score")
    answers, ended = [], threading.Event()
    (client := threading.Thread(target=ask, args=(port, answers, ended))).start()
    for score in (1, 2, 3):
        publish(score)  # while the client sends requests; version 1 exists already and is not stored again
        ended.wait(3)
    ended.set()
    client.join()
    scores = collections.Counter(one.get("score", "failed") for one in answers)
    print(zerocopy.memory_report(), "\nrequests that failed:", scores.pop("failed", 0))
    print("answers by score:", *sorted(scores.items()))
    print("replicas that answered:", len({one["replica"] for one in answers if one}))


if __name__ == "__main__":
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=500_000_000, include_dashboard=False, **quiet)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        main()
    finally:
        zerocopy.remove("service")
        serve.shutdown()
