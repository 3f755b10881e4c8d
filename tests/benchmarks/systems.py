"""Which ways to give a model to workers are compared? Each way is a system. All systems have the same interface."""

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
        name: its name on the command line.
        title: its name in tables.
        environment: additional environment variables of its processes.
        publishes: whether the publisher creates and publishes a model.
        keeps: whether the publisher keeps its own model, because a real publisher would continue to use it.
        copies: whether each worker has a private copy.
        has_calls: whether calls of tasks that receive the model are measured.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    environment: ClassVar[Mapping[str, str]] = {}
    publishes: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    copies: ClassVar[bool] = False
    has_calls: ClassVar[bool] = True

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """Publish a model, and return a handle, from which workers load.

        A reference of Ray is inside a list in the handle, because Ray would replace a bare reference by its object.
        """
        raise NotImplementedError

    def load(self, handle: Any) -> nn.Module:
        """Load the model in a worker."""
        raise NotImplementedError

    def calls(self, model: nn.Module, handle: Any) -> dict[str, Call]:
        """Functions that call a task with the model and an argument, and wait for the result, which is the argument.

        `handle` calls it with the published model, and `instance` with the model itself, if the system can do this.
        """
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
        """Publish the model."""
        del build, folder
        return zerocopy.publish(model)

    def load(self, handle: Any) -> nn.Module:
        """Load the publication."""
        model: nn.Module = handle.load()
        return model

    def calls(self, model: nn.Module, handle: Any) -> dict[str, Call]:
        """Calls of a `@zerocopy.task`."""
        return {
            "handle": lambda: _same(handle, 1),
            "instance": lambda: _same(model, 1),
        }


class Adoption(ZeroCopy):
    """This package with adoption: the publisher's model uses the weights in the store."""

    name, title = "adoption", "zerocopy with adoption"

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """Publish the model, and let it use the published weights."""
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
        """Create its wrapper in actor mode."""
        del build, folder
        return self._wrapper(model).from_model(model, mode="actor")

    def load(self, handle: Any) -> nn.Module:
        """Call `load()` of the wrapper."""
        model: nn.Module = handle.load()
        return model

    def calls(self, model: nn.Module, handle: Any) -> dict[str, Call]:
        """Calls of a method of its wrapper in task mode."""
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
    """Ray alone: `ray.put` of the model."""

    name, title = "plain", "ray.put"
    copies = True

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """Put the model into the store."""
        del build, folder
        return [ray.put(model)]

    def load(self, handle: Any) -> nn.Module:
        """Get the model from the store."""
        model: nn.Module = ray.get(handle[0])
        return model

    def calls(self, model: nn.Module, handle: Any) -> dict[str, Call]:
        """Calls of a task that receives the reference."""
        del model
        return {"handle": lambda: ray.get(_same_by_reference.remote(handle[0], 1))}


class RayTensors(PlainPut):
    """`ray.put`, with Ray's option for zero-copy tensors."""

    name, title = "ray-tensors", "ray.put, zero-copy tensors"
    environment: ClassVar[Mapping[str, str]] = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    copies = False


class Safetensors(System):
    """A file that each worker maps into memory. Its tensors are assigned to a model that was created without memory."""

    name, title = "safetensors", "safetensors file"
    keeps = has_calls = False

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """Write the file. The handle is its path and the function that creates the model.

        The file also contains non-persistent buffers, because a model without memory lacks their values.
        """
        from safetensors.torch import save_file

        path = folder / f"{id(model)}.safetensors"
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        save_file({name: tensor.detach() for name, tensor in named.items()}, path)
        return str(path), build

    def load(self, handle: Any) -> nn.Module:
        """Create a model on the meta device, and assign the tensors of the file to it."""
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
    """Each worker creates its own model."""

    name, title = "own", "built by each worker"
    publishes = keeps = has_calls = False
    copies = True

    def publish(self, model: nn.Module, build: Build, folder: Path) -> Any:
        """Publish nothing. The handle is the function that creates the model."""
        del model, folder
        return build

    def load(self, handle: Any) -> nn.Module:
        """Create a model."""
        model: nn.Module = handle()
        return model


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (ZeroCopy(), Adoption(), RayZeroCopy(), RayTensors(), PlainPut(), Safetensors(), OwnBuild())
}


def find(name: str) -> System:
    """The system called `name`.

    Raises:
        ArgumentError: there is no such system.
    """
    if name not in SYSTEMS:
        raise ArgumentError(f"There is no system {name!r}.", hint=f"choose from {', '.join(SYSTEMS)}.")
    return SYSTEMS[name]
