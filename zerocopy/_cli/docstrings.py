"""What do the docstrings of the Python standard library say? The demo searches them."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Importing these modules runs only definitions. It is the way to the docstrings of C code.
COMPILED = """
    array binascii bisect builtins bz2 cmath codecs collections contextvars csv datetime decimal errno fcntl
    functools gc grp hashlib heapq hmac io itertools json lzma marshal math mmap operator os pickle pwd queue
    random re resource select signal socket sqlite3 ssl struct sys syslog termios threading time unicodedata
    warnings weakref zlib zoneinfo
"""
# Tests, programs, modules that will be removed, and modules that print something when they are imported.
NOT_A_LIBRARY = """
    antigravity distutils ensurepip idlelib lib2to3 pydoc_data test tests this turtledemo
"""


def stdlib_docstrings() -> list[tuple[str, str]]:
    """Public functions, classes and methods, each with the first paragraph of its docstring, and no docstring twice."""
    found: dict[str, str] = {}
    for name, docstring in (*docstrings_in_source(), *docstrings_in_c()):
        found.setdefault(docstring, name)
    return [(name, _first_paragraph(name, docstring)) for docstring, name in found.items()]


def docstrings_in_source() -> Iterator[tuple[str, str]]:
    """The docstrings of Python code. Parses the modules, and imports none."""
    left_out = set(NOT_A_LIBRARY.split())
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        for file in (root / f"{name}.py", *sorted((root / name).rglob("*.py"))):
            parts = [part for part in file.relative_to(root).with_suffix("").parts if part != "__init__"]
            if file.is_file() and not set(parts) & left_out and all(map(_is_public, parts)):
                yield from _docstrings_below(ast.parse(file.read_bytes()), ".".join(parts))


def _docstrings_below(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and _is_public(node.name):
            name = f"{prefix}.{node.name}"
            if text := ast.get_docstring(node):
                yield name, text
            if isinstance(node, ast.ClassDef):
                yield from _docstrings_below(node, name)


def docstrings_in_c() -> Iterator[tuple[str, str]]:
    """The docstrings of C code."""
    for module_name in COMPILED.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # this Python was built without it
            continue
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, member in _public_members(module):
            yield f"{prefix}{name}", inspect.cleandoc(member.__doc__)
            for method_name, method in _public_members(member) if inspect.isclass(member) else ():
                yield f"{prefix}{name}.{method_name}", inspect.cleandoc(method.__doc__)


def _public_members(owner: Any) -> Iterator[tuple[str, Any]]:
    for name in filter(_is_public, getattr(owner, "__all__", vars(owner))):
        member = getattr(owner, name, None)
        if (inspect.isroutine(member) or inspect.isclass(member)) and member.__doc__:
            yield name, member


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _first_paragraph(name: str, docstring: str) -> str:
    """The first paragraph that is not only a signature, on one line."""
    first, *others = docstring.split("\n\n")
    is_signature = others and first.startswith(f"{name.rpartition('.')[2]}(")
    return " ".join((others[0] if is_signature else first).split())
