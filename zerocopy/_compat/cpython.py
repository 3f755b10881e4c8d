"""What does CPython do that Python does not promise: its garbage collector, reference counts, and what pickle and typing use.

Read in CPython 3.11; a link says where.
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


@contextlib.contextmanager
def collector_paused(*, promote: bool = False) -> Iterator[None]:
    """Keep the garbage collector from looking at everything again and again while objects are made.

    Args:
        promote: count what was made as old at once: the collector would look at it just to find out that it stays. Nothing that
            happens often may ask for it, because only the survivors of a look are counted for when to look at old objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if promote and was_enabled and not gc.get_freeze_count():
            gc.freeze()  # moves all objects out of their generations, and
            gc.unfreeze()  # into the oldest: both link two lists
    finally:
        if was_enabled:
            gc.enable()


# How many references there are to an object, that of asking included: to be compared with `count_for`. Ask without a name for the
# object, as in `reference_count(held[0])`: a name would be one more. https://docs.python.org/3.11/library/sys.html#sys.getrefcount
reference_count: Callable[[object], int] = sys.getrefcount


def reference_counts(objects: Iterable[object]) -> list[int]:
    """The same of each object. The sequence that is asked about counts with who else holds them."""
    return list(map(sys.getrefcount, objects))


def most_references(objects: Iterable[object]) -> int:
    """The largest of their `reference_counts`, told a little faster."""
    return max(map(sys.getrefcount, objects))


_COUNT_FOR_ONE = reference_counts([[]])[0]


def count_for(holders: int) -> int:
    """The count of an object to which `holders` refer, and nobody else. What asking adds depends on the version of Python."""
    return _COUNT_FOR_ONE + holders - 1


def held_by_more_than(holders: int, objects: Mapping[K, object]) -> frozenset[K]:
    """Keys of the `objects` to which more than `holders` refer, of which the mapping is one."""
    most = count_for(holders)
    counts = reference_counts(objects.values())
    return frozenset(key for key, count in zip(objects, counts, strict=True) if count > most)


def written_objects(pickler: Any) -> list[Any]:
    """What a pickler has written so far, but for strings, numbers and the like that it writes again each time.

    Its memo keeps all of it alive, also what was made only to be written.
    https://github.com/python/cpython/blob/v3.11.7/Modules/_pickle.c: `PicklerMemoProxy`.
    """
    return [obj for _, obj in pickler.memo.copy().values()]


# What pickle writes as one opcode of its own: `cls.__new__(cls)`.
# https://github.com/python/cpython/blob/v3.11.7/Lib/copyreg.py: `__newobj__`
new_object: Callable[..., Any] = copyreg.__newobj__  # type: ignore[attr-defined]


_OURS = {__name__.partition(".")[0], "ray"}
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_INSTALLED = ("site-packages", "dist-packages")  # folders of packages
_CALLS_WHAT_IT_IS_GIVEN = {("threading.py", "run"), ("thread.py", "run")}  # the latter of `concurrent.futures`


def other_threads_may_compute() -> bool:
    """Whether another thread may be inside of an operator of torch at this moment.

    A thread that waits does so in the standard library, or in a package that has not been called by torch or by the user's own
    code. https://docs.python.org/3.11/library/sys.html#sys._current_frames
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
    """Warn at the user's line that called this package, be it through Ray. Python 3.12 has `skip_file_prefixes` for that.

    https://docs.python.org/3.12/library/warnings.html#warnings.warn
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package_of(frame) in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def _package_of(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def make_immortal(obj: object) -> None:
    """Let an object, and what it refers to, live until its process ends.

    Not even the end of the interpreter drops it, as it would drop a global variable.
    https://docs.python.org/3.11/c-api/refcounting.html#c.Py_IncRef
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(obj))


def module_of_caller(frames: int) -> str:
    """The name of the module whose code called the function that asks; with `frames` = 2, that called its caller.

    Code that Cython compiled has no frames. https://docs.python.org/3.11/library/sys.html#sys._getframe
    """
    return str(sys._getframe(frames + 1).f_globals.get("__name__", ""))


# The names of the slots that `object` pickles of instances of a class, inherited ones too.
# https://github.com/python/cpython/blob/v3.11.7/Lib/copyreg.py: `_slotnames`
slot_names: Callable[[type], list[str]] = copyreg._slotnames  # type: ignore[attr-defined]


def is_init_of_protocol(init: Callable[..., None]) -> bool:
    """Whether nobody wrote this `__init__`: typing gives it to every class that is a Protocol.

    https://github.com/python/cpython/blob/v3.11.7/Lib/typing.py: `_no_init_or_replace_init`.
    """
    return getattr(init, "__name__", "") == "_no_init_or_replace_init"  # a partialmethod has no name
