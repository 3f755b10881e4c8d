"""What is in a model folder of Hugging Face? The files are mapped, and no weights are read."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import attrs

from zerocopy._publish import files
from zerocopy.errors import CheckpointError

DEPTH = 3  # levels in the names of parts


@attrs.frozen
class Folder:
    """A model on disk.

    Attributes:
        name: the name of the folder.
        kind: the architecture that config.json names, or empty.
        files: the files with weights.
        fields: bytes of each part, largest first.
        dtypes: bytes of each dtype, largest first.
        config_dtype: the dtype that config.json names, or empty.
    """

    name: str
    kind: str
    files: tuple[str, ...]
    fields: tuple[tuple[str, int], ...]
    dtypes: tuple[tuple[str, int], ...]
    config_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(nbytes for _, nbytes in self.fields)


def folder_of(path: Path) -> Folder:
    """Look into a folder.

    Raises:
        CheckpointError: there are no files with weights, one is missing, or one cannot be read.
    """
    tensors = files.read([("", str(path))], None).tensors
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    config = _json(path / "config.json") if (path / "config.json").exists() else {}
    kind = ", ".join(config.get("architectures") or []) or str(config.get("model_type") or "")
    config_dtype = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    fields = by_part({name: tensor.nbytes for name, tensor in tensors.items()})
    names = tuple(Path(file).name for file in files.files_at(str(path)))
    return Folder(path.resolve().name, kind, names, fields, tuple(dtypes.most_common()), config_dtype)


def by_part(nbytes: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """Bytes of each part of a model, largest first. Numbered layers are one part."""
    parts: Counter[str] = Counter()
    for name, count in nbytes.items():
        *modules, parameter = name.split(".")
        known = itertools.takewhile(lambda module: not module.isdigit(), modules)
        parts[".".join(itertools.islice(known, DEPTH)) or parameter] += count
    return tuple(parts.most_common())


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}.") from None
    if not isinstance(told, dict):
        raise CheckpointError(f"{str(path)!r} is not a JSON object.")
    return told
