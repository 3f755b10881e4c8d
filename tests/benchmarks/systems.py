"""What is compared: each way to give a model to workers, behind one interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
from torch import nn

import zerocopy
from zerocopy.errors import ArgumentError

Build = Callable[[], nn.Module]
Call = Callable[[], Any]


class System:
    """One way to give a model to workers.

    Attributes:
        name: what the command line calls it.
        title: what tables call it.
        environment: variables that its processes start with.
        publishes: whether the publisher does anything.
        keeps: whether the publisher's own model stays alive, as it does where the publisher goes on using it.
        copies: whether each worker has a private copy.
        has_calls: whether a task can be given the model.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    environment: ClassVar[Mapping[str, str]] = {}
    publishes: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    copies: ClassVar[bool] = False
    has_calls: ClassVar[bool] = True

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """A handle that workers load from. It holds references in a list, where Ray leaves them alone."""
        raise NotImplementedError

    def load(self, handle: Any) -> nn.Module:
        """The model, in a worker."""
        raise NotImplementedError

    def calls(self, model: nn.Module, handle: Any) -> dict[str, Call]:
        """Tasks that return their argument, waited for: by `handle`, and by `instance` where the model itself can be given."""
        del model, handle
        return {}


@zerocopy.task
def _same(model: nn.Module, argument: int) -> int:
    del model
    return argument


class ZeroCopy(System):
    """This package."""

    name, title = "zerocopy", "zerocopy"

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """A publication."""
        del build, folder
        return zerocopy.publish(model)

    def load(self, handle: Any) -> nn.Module:
        """What `load()` gives."""
        model: nn.Module = handle.load()
        return model

    def calls(self, model: nn.Module, handle: Any) -> dict[str, Call]:
        """A `@zerocopy.task`."""
        return {
            "handle": lambda: _same(handle, 1),
            "instance": lambda: _same(model, 1),
        }


class Adoption(ZeroCopy):
    """This package, the publisher's model re-pointed at the store."""

    name, title = "adoption", "zerocopy with adoption"

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """A publication whose weights are the publisher's too."""
        del build, folder
        adopting: Any = zerocopy.publish
        return adopting(model, adopt=True)


class _Echoing(nn.Module):
    """A model with a method that returns its argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def echo(self, argument: int) -> int:
        return argument


class RayZeroCopy(System):
    """The package `ray-zerocopy`."""

    name, title = "ray-zerocopy", "ray-zerocopy 0.2.0"

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """Its wrapper in actor mode."""
        del build, folder
        return self._wrapper(model).from_model(model, mode="actor")

    def load(self, handle: Any) -> nn.Module:
        """What its `load()` gives."""
        model: nn.Module = handle.load()
        return model

    def calls(self, model: nn.Module, handle: Any) -> dict[str, Call]:
        """A method of its wrapper in task mode."""
        del handle
        echoing = model if isinstance(model, torch.jit.ScriptModule) else _Echoing(model)
        remote = self._wrapper(model).for_tasks(echoing, method_names=("echo",))
        return {"handle": lambda: remote.echo(1)}

    def _wrapper(self, model: nn.Module) -> Any:
        ray_zerocopy = importlib.import_module("ray_zerocopy")
        is_script = isinstance(model, torch.jit.ScriptModule)
        return ray_zerocopy.JITModelWrapper if is_script else ray_zerocopy.ModelWrapper


@ray.remote
def _same_by_reference(model: nn.Module, argument: int) -> int:
    del model
    return argument


class PlainPut(System):
    """Ray alone."""

    name, title = "plain", "ray.put"
    copies = True

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """A reference to the model."""
        del build, folder
        return [ray.put(model)]

    def load(self, handle: Any) -> nn.Module:
        """What Ray unpickles."""
        model: nn.Module = ray.get(handle[0])
        return model

    def calls(self, model: nn.Module, handle: Any) -> dict[str, Call]:
        """A task that is given the reference."""
        del model
        return {"handle": lambda: ray.get(_same_by_reference.remote(handle[0], 1))}


class RayTensors(PlainPut):
    """Ray with its switch for tensors."""

    name, title = "ray-tensors", "ray.put, zero-copy tensors"
    environment: ClassVar[Mapping[str, str]] = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    copies = False


class Safetensors(System):
    """A file that each worker maps, under a model made without memory."""

    name, title = "safetensors", "safetensors file"
    keeps = has_calls = False

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """The file and how to make the model. Non-persistent buffers are in it too: a model without memory lacks them."""
        from safetensors.torch import save_file

        path = folder / f"{id(model)}.safetensors"
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        save_file({name: tensor.detach() for name, tensor in named.items()}, path)
        return str(path), build

    def load(self, handle: Any) -> nn.Module:
        """A model on the meta device, its tensors assigned from the file."""
        from safetensors.torch import load_file

        path, build = handle
        with torch.device("meta"):
            model: nn.Module = build()
        tensors = load_file(path)
        model.load_state_dict({name: tensors.pop(name) for name in model.state_dict()}, assign=True)
        for name, tensor in tensors.items():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, tensor)
        return model


class OwnBuild(System):
    """Each worker makes its own model."""

    name, title = "own", "built by each worker"
    publishes = keeps = has_calls = False
    copies = True

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """How to make the model."""
        del model, folder
        return build

    def load(self, handle: Any) -> nn.Module:
        """A model of this worker's own."""
        model: nn.Module = handle()
        return model


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (ZeroCopy(), Adoption(), RayZeroCopy(), RayTensors(), PlainPut(), Safetensors(), OwnBuild())
}


def find(name: str) -> System:
    """The system called `name`.

    Raises:
        ArgumentError: there is none.
    """
    if name not in SYSTEMS:
        raise ArgumentError(f"There is no system {name!r}.", hint=f"choose from {', '.join(SYSTEMS)}.")
    return SYSTEMS[name]
