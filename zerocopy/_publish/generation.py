"""Does a model generate text with the settings next to its files? `from_pretrained` reads them, `from_config` does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zerocopy._compat.cpython import warn_caller
from zerocopy.errors import CheckpointWarning

FILE = "generation_config.json"


def tell_of_generation(models: Mapping[str, Any], sources: Iterable[tuple[str, str]]) -> None:
    """Warn of models whose settings differ from the settings in the folder of their files.

    Args:
        models: the models by path.
        sources: the prefix of a model's names, and where its files are: a folder, or files and patterns in a folder.
    """
    places = {(prefix, Path(source) if Path(source).is_dir() else Path(source).parent) for prefix, source in sources}
    for path, model in models.items():
        for prefix, folder in places:
            built: Any = getattr(model, "generation_config", None)
            if f"{path}.".startswith(prefix) and (folder / FILE).exists() and _differs(built, folder):
                warn_caller(
                    f"This {type(model).__name__} does not generate as {FILE} of {str(folder)!r} says. Hint: let the function "
                    f"that builds it set model.generation_config = {type(built).__name__}.from_pretrained({str(folder)!r}).",
                    CheckpointWarning,
                )


def _differs(built: Any, folder: Path) -> bool:
    if not hasattr(type(built), "from_pretrained"):  # it is not a config of transformers
        return False
    try:
        return bool(type(built).from_pretrained(folder) != built)
    except (OSError, ValueError):  # the file cannot be read: `from_pretrained` would say so
        return False
