"""Has a pipeline changed since it was published or loaded?

This check runs each time a pipeline is passed. So it takes microseconds per tensor, and does not walk the pipeline. Identities,
places, version counters and modes show the changes that Python and torch made. `contents` detects all other writes.

Nothing is kept alive. There are not even weak references to tensors, because `torch.utils.swap_tensors` refuses a tensor that has
one. The tensors are found again in the modules that hold them, or the caller provides them.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from zerocopy._changes.contents import Contents
from zerocopy._changes.members import Members, has_members
from zerocopy._changes.programs import Programs
from zerocopy._changes.tensor_states import TensorStates
from zerocopy._split import paths
from zerocopy._split.introspect import Introspection
from zerocopy._store.manifest import Placement
from zerocopy._store.tensors import TensorTable


class Snapshot:
    """The state of a pipeline's shared tensors at one moment, and the modules that hold them. Keeps none of them alive."""

    def __init__(self, found: Introspection) -> None:
        modules = list(filter(has_members, paths.modules_among(found.mutable)))
        self._modules = list(map(_weakly, modules))
        self._members = Members(modules)
        known = [*(self._members.tensors(modules) or ()), *found.loose, *found.components]
        ids = set(map(id, known))
        deeper = {id(tensor): tensor for tensor in (*found.table.objects, *found.composites) if id(tensor) not in ids}
        routes = paths.routes_to(modules, deeper.keys()) if deeper else {}
        self._routes = [routes.get(target, ()) for target in deeper]  # an empty route leads to no object
        self._tensors = TensorStates([*known, *deeper.values()])
        self._programs = Programs(found.mutable)
        self._contents = Contents(found.table)

    def is_unchanged(self, loose: Sequence[Any], components: Sequence[Any]) -> bool:
        """Whether the tensors are unchanged, and the modules have the same members under the same names, and the same modes.

        Args:
            loose: the tensors that the pipeline holds outside of modules now.
            components: the components in the introspection, which the caller has kept alive.
        """
        modules = [module for ref in self._modules if (module := ref()) is not None]
        members = self._members.tensors(modules) if len(modules) == len(self._modules) else None
        if members is None:
            return False
        deeper = [paths.follow(modules, route) for route in self._routes]
        tensors = [*members, *loose, *components, *deeper]
        return (
            self._tensors.are_unchanged(tensors) and self._programs.are_unchanged() and self._contents.are_unchanged()
        )

    def note_written(self, places: Mapping[object, Placement]) -> None:
        """Record where the storages were written in the store, by key."""
        self._contents.note_written(places)

    def unchanged(self, table: TensorTable) -> set[object]:
        """Keys of storages in `table` whose bytes have not changed, as far as this can be detected without reading all."""
        by_key: dict[object, list[Any]] = defaultdict(list)
        for tensor, spec in table.items():
            by_key[table.key_of(spec)].append(tensor)
        known = self._tensors.unchanged(table.objects)
        same = {key for key, tensors in by_key.items() if known.issuperset(map(id, tensors))}
        return same - self._contents.changed(same)


def _weakly(module: nn.Module) -> Callable[[], nn.Module | None]:
    """A weak reference; a strong one if the class does not support weak ones, such as a module that is also a tuple."""
    return weakref.ref(module) if type(module).__weakrefoffset__ else lambda: module
