"""Which policy applies to the next object that a pickler writes, and how is each value of a pipeline written under its policy?

A pickler writes the attributes of an object as one dict, so the policy cannot change between two attributes. But a pipeline
shares some of its attributes and copies others. So its values are written before it, grouped by policy: this is the *prelude*.
There is a `Place` before each group. The pickler writes nothing for a `Place`, but is in its zone from then on. After the
prelude, the pickler writes the pipeline itself. Its memo now has all values, so it writes references to them, and no policy
matters any more. The prelude needs only the values, so the policies apply no matter how a class pickles itself.

An example, split at shared roots:

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        settings: dict = copied()
        top_k: int = copied(default=5)

    search = Search(encoder, {"fallback": head})    # two modules

`PipelineReducer.reduce` reduces `search` to `call, (prelude, new_object, (Search,), None), state`. The prelude is
`[Place(AUTO), encoder, Place(COPIED), settings, Place(AUTO)]`. The pickler writes, in this order:

    Place(AUTO)        nothing. It is now in the zone AUTO, where modules are shared.
    encoder            its number: it is a shared root, so the other skeleton has it.
    Place(COPIED)      nothing. It is now in the zone COPIED, where modules are copied.
    settings           the dict, and `head` in it. The tensors of `head` get numbers: the outer skeleton keeps their bytes.
    Place(AUTO)        nothing. It is back in the zone that it was in before the pipeline.
    the new object     `Search.__new__(Search)`. The memo has it from now on.
    state              `{"encoder": number, "settings": reference, "top_k": 5}`

Without the prelude, the pickler would meet `settings` in the state, in the zone AUTO, and `head` would become a shared root.
`top_k` is not in the prelude: strings and numbers are the same in every zone.

A value may refer back to the pipeline. If `settings` held `search`, the pickler would meet `search` again inside the prelude,
before the memo has it. The prelude of this second visit has only the copied values: they must be written before any state. A
third visit has no prelude. The recursion ends, because the memo has a dict or a list as soon as the pickler begins to write it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from zerocopy._compat.torch import is_parametrized_class
from zerocopy._declare.pipeline import fields, is_pipeline_class
from zerocopy._split import paths, reducers
from zerocopy._split.roles import SCALARS, Role, Roles
from zerocopy.errors import ArgumentError


class Zone(enum.Enum):
    """The policy that applies at the place that the pickler has reached."""

    AUTO = "modules are shared, all else is copied"
    SHARED = "tensors and arrays are shared"
    COPIED = "all is copied"


class Place(NamedTuple):
    """The place of the pickler. When it meets a `Place` among the objects to write, it moves there. Unpickled, it is None.

    Attributes:
        zone: the policy that applies here.
        composite: the object that is taken apart here. Tensors that the pickler first meets here are its components.
    """

    zone: Zone
    composite: Any = None


def call(_before: object, function: Any, arguments: tuple[Any, ...], _after: object) -> Any:
    """Rebuild an object from a function and its arguments. The other two values were only for the pickler."""
    return function(*arguments)


def components_of(composite: Any, reduced: tuple[Any, ...], place: Place) -> tuple[Any, ...]:
    """Change `reduced` so that tensors in its arguments count as components of `composite`. The pickler is at `place`."""
    function, arguments, *rest = reduced
    return (call, (Place(place.zone, composite), function, arguments, place), *rest)


class PipelineReducer:
    """Reduces pipelines so that each value is written in the zone of its policy. It is for one pickling.

    Attributes:
        roots: ids of the values that are declared as shared, of all pipelines that were reduced so far.
    """

    def __init__(self, copied: Mapping[int, Collection[str]], roles: Roles) -> None:
        """`copied`: attributes to treat as `copied()` fields, by the id of the object that has them."""
        self.roots: set[int] = set()
        self._copied = copied
        self._roles = roles
        self._visits: dict[int, int] = {}

    def reduce(self, pipeline: Any, place: Place) -> Any:
        """How to write a pipeline that was met at `place`: its values in their zones, then itself."""
        # Not by our own reducer: it would publish the pipeline, which is already being published.
        is_parametrized = is_parametrized_class(type(pipeline))
        reduced = reducers.reduce_parametrized(pipeline) if is_parametrized else reducers.reduce_as_pickle(pipeline)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        prelude = self._prelude(pipeline, (arguments, *rest[:1]), place)
        return (call, (prelude, function, arguments, None), *rest) if prelude else reduced

    def _prelude(self, pipeline: Any, written: tuple[Any, ...], place: Place) -> list[Any]:
        """The objects to write before a pipeline. `written` are the arguments and the state that will be written for it."""
        held = paths.attributes_of(pipeline)
        declared = fields(type(pipeline)) if is_pipeline_class(type(pipeline)) else {}
        copied_names = {name for name, field in declared.items() if field.policy == "copied"}
        copied_names.update(self._copied.get(id(pipeline), ()))
        shared_names = declared.keys() - copied_names
        _check_no_class(pipeline, {name: held[name] for name in shared_names if name in held})
        self._note_roots(pipeline, held, shared_names, copied_names)
        copied_ids = {id(held[name]) for name in copied_names if name in held}
        written_values = _values_in(written, set(map(id, held.values())))
        values = [value for value in written_values if type(value) not in SCALARS and not isinstance(value, type)]
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
        if isinstance(pipeline, nn.Module):  # its own parameters and buffers are shared, like those of modules inside
            own = {**pipeline._parameters, **pipeline._buffers}
            undeclared = own.keys() - shared_names - copied_names
            roots += [own[name] for name in undeclared if own[name] is not None]
        # A pipeline inside is not a root: its fields follow their own policies.
        self.roots.update(id(value) for value in roots if self._roles[type(value)] is not Role.PIPELINE)


def _check_no_class(pipeline: Any, shared: Mapping[str, Any]) -> None:
    """Refuse a class of models instead of an instance: it has no weights, and would be published with 0 bytes.

    Raises:
        ArgumentError: a shared field holds such a class.
    """
    for name, value in shared.items():
        if isinstance(value, type) and (issubclass(value, nn.Module) or is_pipeline_class(value)):
            raise ArgumentError(
                f"Field {name!r} of {type(pipeline).__name__} is shared() but holds the class {value.__name__!r}, which has no "
                "weights.",
                hint=f"give an instance: {name}={value.__name__}(...). A class belongs into a copied() field.",
            )


def _values_in(written: Any, held_ids: set[int], depth: int = 4) -> Iterator[Any]:
    """The values that will be written for a pipeline: from its state and slots, from the members of a module, from arguments.

    Containers that the pipeline does not hold itself only bring its values along: pickling created them, or a module has them.
    """
    for value in written:
        if id(value) in held_ids or not depth or type(value) not in (dict, list, tuple):
            yield value
        else:
            yield from _values_in(value.values() if type(value) is dict else value, held_ids, depth - 1)
