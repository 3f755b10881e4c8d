"""What a user declares, in every spelling."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional, Protocol

import attrs
import pipelines
import pytest
import ray
import torch
from torch import nn

import zerocopy
from zerocopy import Copied, Shared, copied, shared
from zerocopy.errors import DeclarationError

if TYPE_CHECKING:
    from nowhere import Tokenizer


def policies(cls: type) -> dict[str, str]:
    return {name: field.policy for name, field in zerocopy.fields(cls).items()}


def test_every_spelling_declares_the_same() -> None:
    """Values, annotations and `Annotated` mix in one class; a name for type checkers only spoils nothing."""

    @zerocopy.pipeline
    class Search:
        encoder: Shared[nn.Module]
        head: nn.Module = shared(device="cpu")
        tokenizer: Copied[Tokenizer]
        index: Annotated[Tokenizer | None, shared(device="cuda")]
        label: Tokenizer = copied(kw_only=True)
        plain = copied(default=3)
        constant: ClassVar[int] = 7

    assert policies(Search) == {
        "encoder": "shared",
        "head": "shared",
        "tokenizer": "copied",
        "index": "shared",
        "label": "copied",
        "plain": "copied",
    }
    assert zerocopy.fields(Search)["index"].device == "cuda"
    search = Search(1, 2, 3, 4, label=5)
    assert (search.encoder, search.head, search.tokenizer, search.index, search.label, search.plain) == (
        1,
        2,
        3,
        4,
        5,
        3,
    )


def test_generated_init_applies_attrs_options() -> None:
    """`default`, `factory`, `converter` and `validator` mean what they mean in attrs."""

    @zerocopy.pipeline
    class Search:
        size: int = copied(converter=int, validator=attrs.validators.gt(0))
        history: list[int] = copied(factory=list)
        top_k: Copied[int] = 5

    one, other = Search("3"), Search(4)
    assert (one.size, one.top_k) == (3, 5)
    assert one.history == []
    assert one.history is not other.history
    with pytest.raises(ValueError, match="size"):
        Search(-1)


def test_kw_only_for_all_fields() -> None:
    """`@pipeline(kw_only=True)` lets a mandatory field follow one with a default."""

    @zerocopy.pipeline(kw_only=True)
    class Search:
        top_k: int = copied(default=5)
        encoder: nn.Module = shared()

    assert Search(encoder=1).top_k == 5
    with pytest.raises(TypeError):
        Search(1)


def test_an_own_init_is_never_replaced() -> None:
    """A hand-written `__init__` stays, also one that is inherited, or made by dataclasses."""

    @zerocopy.pipeline
    class Base:
        encoder = shared()

        def __init__(self, encoder: object) -> None:
            self.encoder = ("mine", encoder)

    @zerocopy.pipeline
    class Derived(Base):
        extra = copied()

    @zerocopy.pipeline
    @dataclass(eq=False)
    class Data:
        encoder: Shared[nn.Module]
        top_k: int = 5

    assert Derived(1).encoder == ("mine", 1)
    assert policies(Derived) == {"encoder": "shared", "extra": "copied"}
    assert not hasattr(Derived, "extra")
    assert (Data(1).encoder, Data(1).top_k, policies(Data)) == (1, 5, {"encoder": "shared"})


def test_subclasses_inherit_fields() -> None:
    """Decorated subclasses add fields to the `__init__`, undecorated ones inherit all."""

    @zerocopy.pipeline
    class Base:
        encoder: nn.Module = shared()

    @zerocopy.pipeline
    class Wide(Base):
        head: nn.Module = shared()

    class Undecorated(Wide):
        pass

    assert vars(Wide(1, 2)) == {"encoder": 1, "head": 2}
    assert policies(Undecorated) == {"encoder": "shared", "head": "shared"}
    assert Undecorated(1, head=2).head == 2


def test_a_pipeline_may_be_a_module() -> None:
    """Fields of an `nn.Module` are registered as its members, whether or not it has an `__init__`."""

    @zerocopy.pipeline
    class Search(nn.Module):
        encoder: nn.Module = shared()
        top_k: int = copied(default=5)

    search = Search(nn.Linear(2, 3))
    assert list(search.state_dict()) == ["encoder.weight", "encoder.bias"]
    assert search.top_k == 5


def test_the_class_stays_itself() -> None:
    """One attribute of ours beside what attrs leaves; `==`, `hash`, `copy` and plain pickle are untouched."""

    class Plain:
        encoder: nn.Module = 1
        size: int = 2

    names = set(vars(Plain))

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        size: int = copied()

    ours = {name for name in set(vars(Search)) - names if not name.startswith("__attrs_")}
    assert ours == {"__init__", "__match_args__", "__init_subclass__"}
    assert type(Search) is type
    one, other = Search(torch.ones(2), 1), Search(torch.ones(2), 1)
    assert one != other
    assert len({one, other}) == 2
    assert torch.equal(copy.deepcopy(one).encoder, one.encoder)
    assert copy.copy(one).encoder is one.encoder
    search = pipelines.search(width=4)
    assert torch.equal(pickle.loads(pickle.dumps(search)).index, search.index)


def test_init_subclass_of_the_user_still_runs() -> None:
    """A class' own `__init_subclass__` is called, with its options."""
    seen = []

    @zerocopy.pipeline
    class Base:
        def __init_subclass__(cls, label: str, **options: Any) -> None:
            super().__init_subclass__(**options)
            seen.append((cls.__name__, label))

    class Derived(Base, label="one"):
        pass

    assert seen == [("Derived", "one")]
    assert policies(Derived) == {}


def test_policies_inside_unions_and_functions() -> None:
    """`Shared[...]` counts inside `Optional` and unions, and under names that only a function knows."""
    from zerocopy import Shared as Ours

    @zerocopy.pipeline
    class Search:
        encoder: Shared[nn.Module] | None = None
        index: Optional[Shared[torch.Tensor]] = None  # noqa: UP045
        head: zerocopy.Shared[nn.Module] = None

    assert policies(Search) == {"encoder": "shared", "index": "shared", "head": "shared"}
    assert Ours is Shared
    assert vars(Search()) == {"encoder": None, "index": None, "head": None}


def test_bases_of_many_kinds() -> None:
    """Protocols leave the `__init__` to attrs, slots hold fields, subclasses made earlier are pipelines too."""

    class Ranker(Protocol):
        def rank(self) -> None: ...

    @zerocopy.pipeline
    class Search(Ranker):
        top_k: int = copied(default=5)

    @zerocopy.pipeline
    class Slots:
        __slots__ = ("__weakref__", "encoder")
        encoder: Shared[nn.Module]

    class Base:
        pass

    class Early(Base):
        pass

    zerocopy.pipeline(Base)
    assert Search().top_k == 5
    assert Slots(1).encoder == 1
    assert ray.cloudpickle.CloudPickler.dispatch[Early] is ray.cloudpickle.CloudPickler.dispatch[Base]


def test_a_stray_declaration_is_refused() -> None:
    """A subclass that declares fields without the decorator is told so, before anything is published."""

    @zerocopy.pipeline
    class Base:
        encoder: nn.Module = shared()

    class Forgot(Base):
        head: nn.Module = shared()

    class Annotated2(Base):
        head: Shared[nn.Module]

    for cls in (Forgot, Annotated2):
        with pytest.raises(DeclarationError, match=f"{cls.__name__} declares field 'head' but is not decorated"):
            zerocopy.plan(cls(nn.Linear(1, 1)))
