"""What would publishing share and copy, as frozen records without a tensor, and how do they print?"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from zerocopy._declare.fields import Policy
from zerocopy._tables import as_html, as_text, format_bytes


@attrs.frozen
class PlanEntry:
    """One part of a pipeline.

    Attributes:
        path: where it is, such as `search.encoder`.
        policy: `"shared"` or `"copied"`.
        kind: the name of its type.
        tensors: how many tensors and arrays it holds.
        bytes: for a shared part, those of the storages that are first met here; for a copied one, those of its pickle.
        dtypes: the dtypes of its tensors and arrays, sorted.
        ties: `a = b` for each two paths at which one tensor, or one memory, is held.
        note: why something is not shared, or empty.
        pickled: for a shared part, bytes of all but its tensors and arrays: each load unpickles them.
        views: of `bytes` those that a loaded part has as views of the store; None where that was not verified.
        copied: bytes that each load copies: what came and is no view, or what tensors and arrays of the loaded part take
            beside the store if that is more. None where it was not verified.
        may_copy: which objects may copy what they are given when they are loaded, and by which method of their class; or empty.
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
        name: what paths start with.
        entries: one per shared part and one per copied attribute.
        shared_bytes: bytes that exist once on each node.
        copied_bytes: bytes that each load copies: as measured, if the plan was verified.
        entangled: the path of a mutable object that can be reached from a shared and from a copied part, or None. Each
            call loads such a pipeline whole.
        view_bytes: of `shared_bytes` those that a loaded pipeline has as views of the store; None if the plan was not verified.
        written_bytes: bytes of views that loading writes to, in whole pages, which each load copies; None as above.
        dtype_bytes: of `shared_bytes`, the bytes of each dtype, the most first; a storage counts by its first tensor.
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
