"""Which records describe what publishing would share and copy, and how are they printed? They are frozen, and hold no tensors."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from zerocopy._declare.fields import Policy
from zerocopy._tables import as_html, as_text, format_bytes


@attrs.frozen
class PlanEntry:
    """One part of a pipeline.

    Attributes:
        path: its place, such as `search.encoder`.
        policy: `"shared"` or `"copied"`.
        kind: the name of its type.
        tensors: the number of tensors and arrays that it holds.
        bytes: for a shared part, the bytes of the storages that no earlier part holds; for a copied part, the bytes of its
            pickle.
        dtypes: the dtypes of its tensors and arrays, sorted.
        ties: `a = b` for paths that hold the same tensor, the same memory, or the same module.
        note: the reason why something is not shared; empty if everything is.
        pickled: for a shared part, the bytes of everything except its tensors and arrays. Each load unpickles them.
        views: the part of `bytes` that a loaded pipeline has as views of the store; None if the plan was not verified.
        copied: bytes that each load copies, None if the plan was not verified. It is the larger of two values: the loaded bytes
            that are not views, and the memory that tensors and arrays of the loaded part take outside of the store.
        may_copy: the objects that may copy the data that they receive when they are loaded, and the methods of their classes that
            may do this; empty if there are none.
    """

    path: str
    policy: Policy
    kind: str
    tensors: int
    bytes: int
    dtypes: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    note: str = ""
    pickled: int = 0
    views: int | None = None
    copied: int | None = None
    may_copy: str = ""


@attrs.frozen(repr=False)
class SharePlan:
    """What publishing a pipeline would share and copy. Prints as a table, in a notebook as HTML.

    Attributes:
        name: the beginning of all paths.
        entries: one entry per shared part and one per copied attribute.
        shared_bytes: bytes that exist once per node.
        copied_bytes: bytes that each load copies. They are measured if the plan was verified.
        entangled: the path of a mutable object that can be reached from a shared and from a copied part, or None. Each call of a
            task loads the whole of such a pipeline.
        view_bytes: the part of `shared_bytes` that a loaded pipeline has as views of the store; None if the plan was not
            verified.
        written_bytes: bytes of views that loading writes to, in whole pages. Each load copies these pages. None if the plan was
            not verified.
        dtype_bytes: the part of `shared_bytes` that each dtype has, largest first. The first tensor of a storage decides its
            dtype.
    """

    name: str
    entries: tuple[PlanEntry, ...]
    shared_bytes: int
    copied_bytes: int
    entangled: str | None = None
    view_bytes: int | None = None
    written_bytes: int | None = None
    dtype_bytes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return as_text(self._headers(), self._rows(), right=_NUMBERS, title=self._title(), caption=self._caption())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        caption = f"{self._title()}. {self._caption()}".strip()
        return as_html(self._headers(), self._rows(), right=_NUMBERS, caption=caption)

    @property
    def _is_verified(self) -> bool:
        return self.view_bytes is not None

    def _title(self) -> str:
        title = f"{self.name}: {format_bytes(self.shared_bytes)} shared once per node, {format_bytes(self.copied_bytes)} copied"
        if self.view_bytes is None:
            return title
        return f"{title}; verified: {format_bytes(self.view_bytes)} are views of the store"

    def _caption(self) -> str:
        sentences = []
        if self.entangled is not None:
            sentences.append(
                f"Loaded whole for each call: {self.entangled!r} is reachable from both a shared and a copied part."
            )
        if self.written_bytes:
            sentences.append(
                f"Loading writes to {format_bytes(self.written_bytes)} of the views: each load copies these pages."
            )
        return " ".join(sentences)

    def _headers(self) -> tuple[str, ...]:
        return _HEADERS[:-2] + (_VERIFIED if self._is_verified else ()) + _HEADERS[-2:]

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for entry in self.entries:
            verified = ("" if count is None else format_bytes(count) for count in (entry.views, entry.copied))
            yield (
                entry.path,
                entry.policy,
                entry.kind,
                str(entry.tensors),
                format_bytes(entry.bytes),
                *(verified if self._is_verified else ()),
                ", ".join(entry.dtypes),
                "; ".join(filter(None, [*entry.ties, entry.note, entry.may_copy])),
            )


_HEADERS = ("path", "policy", "kind", "tensors", "bytes", "dtypes", "ties and notes")
_VERIFIED = ("views", "copied")
_NUMBERS = ("tensors", "bytes", *_VERIFIED)
