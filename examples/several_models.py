"""How do I share several models of one pipeline between Ray tasks and actors?

Give each model a field: they are published together, and a worker loads all of them, or only those that it needs.

python examples/several_models.py
"""

import logging

import ray
import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared


@zerocopy.pipeline
class Search:
    encoder: nn.Module = shared()  # turns a query into a vector
    index: torch.Tensor = shared()  # a vector for each document
    ranker: nn.Module = shared()  # scores the found documents; uses the encoder's first layer too
    titles: list[str] = copied()  # each worker has its own
    candidates: int = copied(default=20)

    @torch.inference_mode()
    def find(self, query: torch.Tensor) -> torch.Tensor:
        return (self.index @ self.encoder(query)).topk(self.candidates).indices

    @torch.inference_mode()
    def __call__(self, query: torch.Tensor) -> str:
        found = self.find(query)
        scores = self.ranker(self.index[found] * self.encoder(query)).squeeze(1)
        return self.titles[found[scores.argmax()]]


@zerocopy.task
def answer(search: Search, query: torch.Tensor) -> str:
    return search(query)


@zerocopy.actor(num_cpus=0.5)
class Finder:
    """Needs only a part of the pipeline, so it takes the publication instead of a loaded pipeline, and loads this part."""

    def __init__(self, publication: zerocopy.Publication[Search]) -> None:
        self.search = publication.load(fields=["encoder", "index", "candidates"])

    def find(self, query: torch.Tensor) -> list[int]:
        return self.search.find(query).tolist()

    def loaded(self) -> list[str]:
        return sorted(vars(self.search))


def main() -> None:
    torch.manual_seed(0)
    first = nn.Linear(512, 512)
    encoder = nn.Sequential(first, nn.ReLU(), nn.Linear(512, 512))
    ranker = nn.Sequential(first, nn.ReLU(), nn.Linear(512, 1))
    search = Search(encoder, torch.randn(10_000, 512), ranker, [f"document {number}" for number in range(10_000)])
    print(zerocopy.plan(search))  # the layer that both models have is stored once

    queries = list(torch.randn(8, 512))
    answers = list(answer.map(search, queries))
    print("tasks answer as this process:", answers == [search(query) for query in queries])

    with zerocopy.publish(search) as publication:
        finder = Finder.remote(publication)
        found = ray.get([finder.find.remote(query) for query in queries])
        print("the actor finds the same:", found == [search.find(query).tolist() for query in queries])
        print("the actor has loaded:", *ray.get(finder.loaded.remote()))


if __name__ == "__main__":
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=500_000_000, include_dashboard=False, **quiet)
    main()
