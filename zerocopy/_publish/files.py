"""Which files hold the weights of a checkpoint, and which tensors are in them?

The content of a file shows its format: safetensors, or a state dict that `torch.save` wrote. Both are mapped if possible.
"""

from __future__ import annotations

import glob
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from zerocopy._store.storages import storage_of
from zerocopy._words import counted, first_line
from zerocopy.errors import CheckpointError

_MAY_BE_CUT = "the file may be incomplete or damaged: download or copy it again."
_HOW_TO_SAVE = "save it with torch.save(model.state_dict(), path)."
KEYS = ("state_dict", "model_state_dict", "model", "module")  # where training frameworks put the state dict
# In the order in which `from_pretrained` of transformers and of diffusers looks for them. The patterns find files with other
# names.
_IN_FOLDERS = (
    "model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json", "*.safetensors.index.json", "*.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "*.bin.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt",
)  # fmt: skip


@attrs.frozen
class Content:
    """The content of the files of a checkpoint.

    Attributes:
        tensors: the tensors by name.
        mapped: keys of the storages that are views of mapped files. The others are in private memory.
        others: names of the entries in the state dicts that are not tensors.
    """

    tensors: dict[str, torch.Tensor] = attrs.field(factory=dict)
    mapped: set[object] = attrs.field(factory=set)
    others: list[str] = attrs.field(factory=list)


def read(sources: Iterable[tuple[str, str]], key: str | None) -> Content:
    """Read the tensors in files.

    Args:
        sources: for each source, the prefix of its names, and where its files are: a path, a pattern, a folder, an index.
        key: the key of the state dict in files of `torch.save`, None to search for it.

    Raises:
        CheckpointError: a file cannot be read, or two files have tensors with the same name.
    """
    content, origin = Content(), dict[str, str]()
    for prefix, source in sources:
        for path in files_at(source):
            tensors, others = _read_one(path, key, content.mapped)
            named = {prefix + name: tensor for name, tensor in tensors.items()}
            if twice := [name for name in named if name in origin]:
                raise CheckpointError(
                    f"{path!r} and {origin[twice[0]]!r} have the same {counted(twice, 'name')}.",
                    hint="give one of them, or a mapping from each model of the pipeline to its files.",
                )
            content.tensors.update(named)
            content.others.extend(prefix + name for name in others)
            origin.update(dict.fromkeys(named, path))
    return content


def files_at(source: str) -> list[str]:
    """The files with weights for a path: the file itself, the files that match a pattern, or those in an index or a folder.

    Raises:
        CheckpointError: there is no such file, or there are several and it is unclear which one is meant.
    """
    path = Path(source)
    if path.is_dir():
        return _in_folder(path)
    if not path.exists() and glob.has_magic(source):
        found = sorted(glob.glob(source))  # noqa: PTH207 (patterns may be absolute)
        if not found:
            raise CheckpointError(
                f"No file matches {source!r}.",
                hint="give a folder, a file, or a pattern such as 'model/*.safetensors'.",
            )
        return found
    return _in_index(path) if path.suffix == ".json" else [source]


def _in_folder(folder: Path) -> list[str]:
    for pattern in _IN_FOLDERS:
        found = sorted(folder.glob(pattern))
        if not found:
            continue
        if pattern.endswith("index.json"):
            return _in_index(_only(found))
        return list(map(str, found)) if pattern == "*.safetensors" else [str(_only(found))]
    names = sorted(entry.name for entry in folder.iterdir())
    raise CheckpointError(
        f"The folder {str(folder)!r} has no weights: {counted(names, 'entry', 'entries')}.",
        hint="give the files themselves, or the folder that has *.safetensors, *.bin, *.pt or *.ckpt files in it.",
    )


def _only(found: list[Path]) -> Path:
    if len(found) > 1:
        names = [path.name for path in found]
        raise CheckpointError(
            f"The folder {str(found[0].parent)!r} has {counted(names, 'file')} with weights.",
            hint="give one of them, not the folder.",
        )
    return found[0]


def _in_index(index: Path) -> list[str]:
    try:
        listed = json.loads(index.read_text())["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{str(index)!r} cannot be read: {error}.") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{str(index)!r} is not an index of weights: it has no 'weight_map'.", hint="give the folder, or the files."
        ) from None
    paths = [index.parent / name for name in dict.fromkeys(listed.values())]
    if absent := [path.name for path in paths if not path.exists()]:
        raise CheckpointError(
            f"{str(index)!r} lists {counted(absent, 'file')} that {'is' if len(absent) == 1 else 'are'} not there.",
            hint="download the whole folder.",
        )
    return list(map(str, paths))


def _read_one(path: str, key: str | None, mapped: set[object]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors in a file by name, and the names of the entries that are not tensors. Adds to `mapped`."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(16)
    except OSError as error:
        hint = None
        if "/" in path and not os.path.splitext(path)[1] and not Path(path).exists():  # noqa: PTH122
            hint = "of a model on a hub, give the folder that huggingface_hub.snapshot_download(...) returns."
        raise CheckpointError(f"{path!r} cannot be read: {error}.", hint=hint) from None
    if start.startswith(b"version https:"):
        raise CheckpointError(
            f"{path!r} is a pointer of Git LFS, not the file with the weights.", hint="run `git lfs pull`."
        )
    if start.startswith(b"PK") or (start.startswith(b"\x80") and start[8:9] != b"{"):
        # Since torch 1.6, these files are zip files. Older ones cannot be mapped.
        return _state_dict_at(path, key, mapped, is_zip=start.startswith(b"PK"))
    return _safetensors_at(path, mapped), []


def _safetensors_at(path: str, mapped: set[object]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except OSError as error:
        raise CheckpointError(f"{path!r} cannot be read: {error}.") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path!r} is not a safetensors file, nor one of torch.save: {error}.", hint=_MAY_BE_CUT
        ) from None
    mapped.update(storage_of(tensor).key for tensor in tensors.values())
    return tensors


def _state_dict_at(
    path: str, key: str | None, mapped: set[object], *, is_zip: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    if is_zip and _is_torchscript(path):
        raise CheckpointError(f"{path!r} is a TorchScript archive.", hint="use zerocopy.publish(torch.jit.load(...)).")
    try:
        saved = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path!r} holds more than weights, and reading it would run code: {_reason(error)}",
            hint="if you trust it, read it with torch.load(..., weights_only=False), and save its state dict alone.",
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path!r} cannot be read by torch: {_reason(error)}", hint=_MAY_BE_CUT) from None
    state = _state_dict_in(saved, key, path)
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    strange = [name for name, tensor in tensors.items() if tensor.layout is not torch.strided or tensor.is_quantized]
    if strange:
        raise CheckpointError(
            f"{path!r} has {counted(strange, 'sparse or quantized tensor')}, which cannot be read from a file here.",
            hint="load the model with torch, and use zerocopy.publish(model, adopt=True).",
        )
    if is_zip:
        mapped.update(storage_of(tensor).key for tensor in tensors.values())
    return tensors, [str(name) for name in state if name not in tensors]


def _is_torchscript(path: str) -> bool:
    """Whether `torch.jit.save` wrote a zip file. Such a file contains code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2].startswith("code/") for name in archive.namelist())
    except zipfile.BadZipFile:  # the error of torch explains more
        return False


def _reason(error: Exception) -> str:
    """One line of an error of torch: the line that names the cause, else the first line."""
    told = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return [*told, first_line(error)][0].rstrip(".") + "."


def _state_dict_in(saved: Any, key: str | None, path: str) -> Mapping[Any, Any]:
    """The state dict in an object that `torch.save` wrote."""
    if key is not None:
        if not isinstance(saved, Mapping) or not _has_tensors(saved.get(key)):
            raise CheckpointError(f"{path!r} has no state dict under {key!r}.", hint=_keys_hint(saved))
        return saved[key]  # type: ignore[no-any-return]
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{path!r} holds {type(saved).__name__!r}, not a state dict.", hint=_HOW_TO_SAVE)
    below = [name for name in saved if _has_tensors(saved[name])]
    for name in KEYS:
        if name in below:
            return saved[name]  # type: ignore[no-any-return]
    if _has_tensors(saved):
        return saved
    if len(below) == 1:
        return saved[below[0]]  # type: ignore[no-any-return]
    several = [repr(name) for name in below]
    raise CheckpointError(
        f"{path!r} has {counted(several, 'state dict') if several else 'no state dict'}.", hint=_keys_hint(saved)
    )


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, torch.Tensor) for one in value.values())


def _keys_hint(saved: Any) -> str:
    below = [repr(name) for name, value in saved.items() if _has_tensors(value)] if isinstance(saved, Mapping) else []
    return f"key= takes one of {', '.join(below)}." if below else _HOW_TO_SAVE
