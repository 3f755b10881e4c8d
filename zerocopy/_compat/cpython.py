"""Which behavior of CPython is used that Python does not promise? Garbage collector, reference counts, pickle, frames, typing.

It was read in the source of CPython 3.11; links show where.
"""

from __future__ import annotations

import contextlib
import copyreg
import ctypes
import gc
import os
import sys
import sysconfig
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

K = TypeVar("K")
FROZEN_BY_PYTHON = 1_000  # Python 3.12 itself freezes 375 objects when it starts. A program that freezes has many more


@contextlib.contextmanager
def collector_paused(*, promote: bool = False) -> Iterator[None]:
    """Pause the garbage collector while many objects are created: else it would scan all objects again and again.

    Args:
        promote: whether the created objects count as old at once. Else the collector would scan them only to find that they stay.
            Frequent operations must not use it: the collector scans old objects after enough objects have survived a scan, and
            objects that were promoted here are not counted.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if promote and was_enabled and gc.get_freeze_count() < FROZEN_BY_PYTHON:
            gc.freeze()  # moves all objects out of their generations
            gc.unfreeze()  # moves them to the oldest generation. Both calls only link two lists
    finally:
        if was_enabled:
            gc.enable()


# Returns the number of references to an object, including that of the call. Compare it with `count_for`. Pass the object without
# a variable, as in `reference_count(held[0])`: a variable would be one more reference.
# https://docs.python.org/3.11/library/sys.html#sys.getrefcount
reference_count: Callable[[object], int] = sys.getrefcount


def reference_counts(objects: Iterable[object]) -> list[int]:
    """Return the number of references to each object. The sequence that is passed is one of their holders."""
    return list(map(sys.getrefcount, objects))


def most_references(objects: Iterable[object]) -> int:
    """Return the largest of their `reference_counts`, a little faster."""
    return max(map(sys.getrefcount, objects))


_COUNT_FOR_ONE = reference_counts([[]])[0]


def count_for(holders: int) -> int:
    """Return the count of an object with exactly so many `holders`. How much the call adds depends on the version of Python."""
    return _COUNT_FOR_ONE + holders - 1


def held_by_more_than(holders: int, objects: Mapping[K, object]) -> frozenset[K]:
    """Return the keys of the `objects` that have more than `holders` holders. The mapping is one of the holders."""
    most = count_for(holders)
    counts = reference_counts(objects.values())
    return frozenset(key for key, count in zip(objects, counts, strict=True) if count > most)


def written_objects(pickler: Any) -> list[Any]:
    """Return the objects that a pickler has written so far, without numbers and similar objects, which it never memoizes.

    Its memo keeps all of them alive, also objects that were created only to be written.
    https://github.com/python/cpython/blob/v3.11.7/Modules/_pickle.c: `PicklerMemoProxy`.
    """
    return [obj for _, obj in pickler.memo.copy().values()]


# The function for `cls.__new__(cls)`. Pickle writes it as a single opcode.
# https://github.com/python/cpython/blob/v3.11.7/Lib/copyreg.py: `__newobj__`
new_object: Callable[..., Any] = copyreg.__newobj__  # type: ignore[attr-defined]


_OURS = {__name__.partition(".")[0], "ray"}
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_INSTALLED = ("site-packages", "dist-packages")  # folders of packages
_CALLS_WHAT_IT_IS_GIVEN = {("threading.py", "run"), ("thread.py", "run")}  # the second one is of `concurrent.futures`


def other_threads_may_compute() -> bool:
    """Whether another thread may be inside an operator of torch at this moment.

    A thread that waits is inside the standard library, or inside a package that neither torch nor the user's own code has
    called. https://docs.python.org/3.11/library/sys.html#sys._current_frames
    """
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    return any(map(_may_compute, frames.values()))


def _may_compute(frame: types.FrameType) -> bool:
    code = frame.f_code
    if (Path(code.co_filename).name, code.co_name) in _CALLS_WHAT_IT_IS_GIVEN:
        return True
    if _is_of_python(code.co_filename):
        return False
    callers = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(frame)]
    return any(file.startswith(_TORCH) or not (_is_of_python(file) or _is_installed(file)) for file in callers)


def _is_of_python(file: str) -> bool:
    return file.startswith((_STANDARD_LIBRARY, "<frozen ")) and not _is_installed(file)


def _is_installed(file: str) -> bool:
    return any(folder in file for folder in _INSTALLED)


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line that called this package, directly or through Ray. Python 3.12 has `skip_file_prefixes` for that.

    https://docs.python.org/3.12/library/warnings.html#warnings.warn
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package_of(frame) in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def _package_of(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def make_immortal(obj: object) -> None:
    """Keep an object, and the objects that it refers to, alive until the process ends.

    Unlike a global variable, it is not dropped at the end of the interpreter either.
    https://docs.python.org/3.11/c-api/refcounting.html#c.Py_IncRef
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(obj))


def module_of_caller(frames: int) -> str:
    """Return the name of the module that called the caller of this function; with `frames` = 2, the module one call further out.

    Code that Cython compiled has no frames. https://docs.python.org/3.11/library/sys.html#sys._getframe
    """
    return str(sys._getframe(frames + 1).f_globals.get("__name__", ""))


# Returns the names of the slots that `object.__reduce_ex__` pickles for instances of a class, including inherited slots.
# https://github.com/python/cpython/blob/v3.11.7/Lib/copyreg.py: `_slotnames`
slot_names: Callable[[type], list[str]] = copyreg._slotnames  # type: ignore[attr-defined]


def is_init_of_protocol(init: Callable[..., None]) -> bool:
    """Whether typing created this `__init__`, as it does for each class that is a Protocol.

    https://github.com/python/cpython/blob/v3.11.7/Lib/typing.py: `_no_init_or_replace_init`.
    """
    return getattr(init, "__name__", "") == "_no_init_or_replace_init"  # a partialmethod has no name
