"""Which policy rules what a pickler is about to write, and how is each value of a pipeline written under its own policy?

A pickler writes the attributes of an object as one dict, without a pause between two of them. A pipeline, though, shares some
of its attributes and copies others. So its values are written *ahead* of it, grouped by policy: the prelude. A `Place` stands
before each group. The pickler writes nothing for a `Place`; it only knows from then on which zone it is in. Then it writes the
pipeline itself. By now its memo knows all values, and writes references to them: whatever policy would rule here, it has
nothing left to rule. The prelude needs nothing but the values, so policies hold whatever way a class has to pickle itself.

An example, split at shared roots:

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        settings: dict = copied()
        top_k: int = copied(default=5)

    search = Search(encoder, {"fallback": head})    # two modules

`PipelineReducer.reduce(search)` gives `call, (prelude, new_object, (Search,), None), state`, with the prelude
`[Place(AUTO), encoder, Place(COPIED), settings, Place(AUTO)]`. The pickler writes, in this order:

    Place(AUTO)        nothing, and is in the zone AUTO, where modules are shared
    encoder            its number: it is a shared root, so it belongs to the other skeleton
    Place(COPIED)      nothing, and is in the zone COPIED, where nothing is a root
    settings           the dict, and in it all of `head` but its tensors, which the outer skeleton keeps
    Place(AUTO)        nothing, and is where it was before the pipeline
    the new object     `Search.__new__(Search)`, known to the memo from now on
    state              `{"encoder": number, "settings": reference, "top_k": 5}`

Without the prelude `settings` would first be met in the state, in the zone AUTO, and `head` would be a shared root. `top_k` is
not in the prelude: strings and numbers are the same in every zone.

If `settings` held `search` itself, the pickler would meet the pipeline for a second time inside the prelude, before the memo
knows it. The prelude of the second visit holds the copied values alone, since those have to be written before any state; on the
third there is none. What the pickler is in the middle of writing is in its memo already, so this ends.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from zerocopy._declare.pipeline import fields, is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.roles import SCALARS, Role, Roles


class Zone(enum.Enum):
    """Which policy rules the place that the pickler has reached."""

    AUTO = "modules are shared, all else is copied"
    SHARED = "tensors and arrays are shared"
    COPIED = "all is copied"


class Place(NamedTuple):
    """Where the pickler is. A place among the objects to be written is where it is from then on; unpickled it is None.

    Attributes:
        zone: the policy that rules here.
        composite: the tensor that is being taken apart here: what is met for the first time is a component of it.
    """

    zone: Zone
    composite: Any = None


def call(_before: object, function: Any, arguments: tuple[Any, ...], _after: object) -> Any:
    """Rebuild what was reduced to a function and its arguments. What was written before and after them has done its work."""
    return function(*arguments)


def components_of(composite: Any, reduced: tuple[Any, ...], place: Place) -> tuple[Any, ...]:
    """`reduced`, written so that what its arguments hold counts as components of `composite`. The pickler is at `place`."""
    function, arguments, *rest = reduced
    return (call, (Place(place.zone, composite), function, arguments, place), *rest)


class PipelineReducer:
    """Reduces pipelines so that every value is written in the zone of its policy, for one pickling.

    Attributes:
        roots: ids of the values that are shared by declaration, of the pipelines reduced so far.
    """

    def __init__(self, copied: Mapping[int, Collection[str]], roles: Roles) -> None:
        """`copied`: attributes to treat as `copied()` fields, by the id of the object that has them."""
        self.roots: set[int] = set()
        self._copied = copied
        self._roles = roles
        self._visits: dict[int, int] = {}

    def reduce(self, pipeline: Any, place: Place) -> Any:
        """How to write `pipeline`, met at `place`: its values in their zones, and then itself."""
        # Not through the registered reducer, which would publish the pipeline while it is being published.
        reduced = pipeline.__reduce_ex__(5)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        prelude = self._prelude(pipeline, rest[0] if rest else None, place)
        return (call, (prelude, function, arguments, None), *rest) if prelude else reduced

    def _prelude(self, pipeline: Any, state: Any, place: Place) -> list[Any]:
        held = paths.attributes_of(pipeline)
        declared = fields(type(pipeline)) if is_pipeline_class(type(pipeline)) else {}
        copied_names = {name for name, field in declared.items() if field.policy == "copied"}
        copied_names.update(self._copied.get(id(pipeline), ()))
        self._note_roots(pipeline, held, declared.keys() - copied_names, copied_names)
        copied_ids = {id(held[name]) for name in copied_names if name in held}
        values = [value for value in _values_of(state) if type(value) not in SCALARS]
        copied = [value for value in values if id(value) in copied_ids]
        others = [value for value in values if id(value) not in copied_ids]
        visit = self._visits[id(pipeline)] = self._visits.get(id(pipeline), 0) + 1
        prelude: list[Any] = []
        if visit == 1 and (copied or place.zone is Zone.COPIED):
            prelude += [Place(Zone.SHARED if place.zone is Zone.SHARED else Zone.AUTO), *others]
        if visit <= 2 and copied:
            prelude += [Place(Zone.COPIED), *copied]
        return [*prelude, place] if prelude else []

    def _note_roots(
        self, pipeline: Any, held: Mapping[str, Any], shared_names: set[str], copied_names: set[str]
    ) -> None:
        roots = [held[name] for name in shared_names if name in held and type(held[name]) not in SCALARS]
        if isinstance(pipeline, nn.Module):  # its own parameters and buffers are shared, as those of modules below it
            own = {**pipeline._parameters, **pipeline._buffers}
            undeclared = own.keys() - shared_names - copied_names
            roots += [own[name] for name in undeclared if own[name] is not None]
        # A pipeline inside is no root: its fields follow their own policies.
        self.roots.update(id(value) for value in roots if self._roles[type(value)] is not Role.PIPELINE)


def _values_of(state: Any) -> list[Any]:
    """The values of a pickled state: of its dict, of its slots, and of the members of a module."""
    parts = [part for part in (state if isinstance(state, tuple) else (state,)) if isinstance(part, dict)]
    members = [part.get(name) for part in parts for name in ("_modules", "_parameters", "_buffers")]
    return [value for group in [*parts, *members] if isinstance(group, dict) for value in group.values()]
