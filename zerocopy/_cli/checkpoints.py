"""What is in a folder of Hugging Face's? Only the headers of its safetensors files are read.

Format: https://github.com/huggingface/safetensors#format: eight bytes with the length of the header, which is JSON.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import attrs

from zerocopy.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DEPTH = 3  # of the names of parts
MOST_HEADER = 100_000_000  # bytes, as in the library
# What safetensors calls a dtype, and torch. Others are shown as they are called there.
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


@attrs.frozen
class Folder:
    """A model on disk.

    Attributes:
        name: what the folder is called.
        kind: the architecture that config.json names, or empty.
        files: the files with weights.
        fields: bytes of each part, the most first.
        dtypes: bytes of each dtype, the most first.
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
    """Read the headers in a folder.

    Raises:
        CheckpointError: there are no such files, one is missing, or one cannot be read.
    """
    files = _files_of(path)
    tensors: dict[str, tuple[str, int]] = {}
    for file in files:
        tensors.update(header_of(file))
    dtypes: Counter[str] = Counter()
    for dtype, nbytes in tensors.values():
        dtypes[DTYPES.get(dtype, dtype)] += nbytes
    config = _json(path / "config.json") if (path / "config.json").exists() else {}
    kind = ", ".join(config.get("architectures") or []) or str(config.get("model_type") or "")
    config_dtype = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    fields = by_part({name: nbytes for name, (_, nbytes) in tensors.items()})
    names = tuple(file.name for file in files)
    return Folder(path.resolve().name, kind, names, fields, tuple(dtypes.most_common()), config_dtype)


def _files_of(path: Path) -> list[Path]:
    """The files that hold the model: those of the index, else the one with the usual name, else all."""
    if (path / INDEX).exists():
        names = _json(path / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{INDEX} in {str(path)!r} has no weight_map.", hint="download the folder again.")
        files = [path / name for name in sorted(set(names.values()))]
    elif (path / SINGLE).exists():
        files = [path / SINGLE]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        others = ", ".join(sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)))
        found = f" It has {others}, which are pickles." if others else ""
        raise CheckpointError(
            f"There is no *.safetensors file in {str(path)!r}.{found}",
            hint="give a folder with config.json and *.safetensors, or module:object.",
        )
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(
            f"{INDEX} in {str(path)!r} names files that are missing: {', '.join(missing)}.", hint="download them."
        )
    return files


def header_of(file: Path) -> dict[str, tuple[str, int]]:
    """Dtype and bytes of each tensor in a safetensors file.

    Raises:
        CheckpointError: it is none.
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > MOST_HEADER:
                raise ValueError(f"its header would have {length:,} bytes")
            told = json.loads(opened.read(length))
        return {
            name: (str(one["dtype"]), int(one["data_offsets"][1] - one["data_offsets"][0]))
            for name, one in told.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror}.") from None
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{str(file)!r} is not a safetensors file: {error}.", hint="see whether it was downloaded whole."
        ) from None


def by_part(nbytes: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """Bytes of each part of a model, the most first: layers that are numbered are one part."""
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
