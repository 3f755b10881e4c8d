"""What would be shared and copied, how much memory does this save, and how large must the store be? This needs no cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click

from zerocopy._cli.checkpoints import Folder, folder_of
from zerocopy._cli.objects import FORM, Target, found
from zerocopy._cli.show import format_option, show, sort_option, units_option
from zerocopy._cli.sizing import Weights, on_node, on_nodes, store_bytes
from zerocopy._compat import containers
from zerocopy._publish.verify import plan as plan_object
from zerocopy._split.plan import SharePlan
from zerocopy._store.object_store import arguments_fraction
from zerocopy._tables import as_text, format_bytes


@click.command()
@click.argument("target", metavar="MODULE:OBJECT | FOLDER")
@click.option("--workers", type=click.IntRange(1), help="Workers on each node.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Nodes, with --workers.")
@click.option(
    "--versions", type=click.IntRange(1), default=1, show_default=True, help="Versions in the store at the same time."
)
@format_option
@sort_option("BYTES", "NAME")
@units_option
def plan(target: str, workers: int | None, nodes: int, versions: int, shown_as: str, sort_by: str) -> None:
    """Show what would be shared and copied, and the store it needs.

    No cluster is needed.

    MODULE:OBJECT is a pipeline or a module, or a function or class that makes one without arguments. A FOLDER of
    Hugging Face's (config.json, *.safetensors or *.bin, also with an index) is looked at without reading its weights. They are
    all shared, and what a pipeline holds besides, such as a tokenizer, is not counted.

    A node's store holds the shared bytes, once for each of --versions, and the copied bytes once per worker, since each call
    carries them. object_store_memory is this sum divided by 0.7, rounded up to 1 MB: calls wait while the arguments of running
    calls take more than 70 % of the store (RAY_max_task_args_memory_fraction). The rest is for results. Without --workers the
    sum is for one worker.

    \b
    Examples:
      zerocopy plan my_models:build
      zerocopy plan my_models:build --workers 8 --nodes 4
      zerocopy plan ~/models/llama --workers 4 --units GB
    """
    if ":" not in target and not Path(target).is_dir():
        raise click.BadParameter(f"{target!r} is not a folder here, and does not name an object. Hint: {FORM}")
    planned = (
        _of_folder(folder_of(Path(target)), sort_by) if Path(target).is_dir() else _of_object(found(target), sort_by)
    )
    store = store_bytes(planned.weights, workers or 1, arguments_fraction(), versions)
    notes = [*planned.notes, *_notes_on_store(store, containers.shared_memory_room())]
    data = {**planned.data, "object_store_memory": store, "notes": notes}
    if workers is not None:
        data |= _totals(planned.weights, workers, nodes)
    show(shown_as, data, lambda: "\n\n".join(_lines(planned, workers, nodes, store, notes)))


@attrs.frozen
class _Planned:
    """The plan of a target, as data and as text, and notes."""

    weights: Weights
    data: dict[str, Any]
    text: str
    dtypes: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]


def _of_object(target: Target, sort_by: str) -> _Planned:
    planned = plan_object(target.made())
    key: Any = (lambda one: one.path) if sort_by == "NAME" else (lambda one: -one.bytes)
    planned = attrs.evolve(planned, entries=tuple(sorted(planned.entries, key=key)))
    data = {
        "name": target.name,
        "shared_bytes": planned.shared_bytes,
        "copied_bytes": planned.copied_bytes,
        "entries": [attrs.asdict(one) for one in planned.entries],
        "dtypes": dict(planned.dtype_bytes),
    }
    return _Planned(_weights_of(planned), data, str(planned), planned.dtype_bytes, ())


def _weights_of(planned: SharePlan) -> Weights:
    return Weights(planned.shared_bytes, planned.copied_bytes)


def _of_folder(folder: Folder, sort_by: str) -> _Planned:
    fields = sorted(folder.fields) if sort_by == "NAME" else list(folder.fields)
    data = {
        "name": folder.name,
        "kind": folder.kind,
        "files": list(folder.files),
        "shared_bytes": folder.nbytes,
        "copied_bytes": 0,
        "entries": [{"path": path, "policy": "shared", "bytes": nbytes} for path, nbytes in fields],
        "dtypes": dict(folder.dtypes),
    }
    files = "1 file" if len(folder.files) == 1 else f"{len(folder.files)} files"
    title = (
        f"{folder.name}{f' ({folder.kind})' if folder.kind else ''}: {format_bytes(folder.nbytes)} shared, in {files}"
    )
    rows = [(path, "shared", format_bytes(nbytes)) for path, nbytes in fields]
    text = as_text(("path", "policy", "bytes"), rows, right=("bytes",))
    return _Planned(
        Weights(folder.nbytes, 0), data, f"{title}\n\n{text}", folder.dtypes, tuple(_notes_on_folder(folder))
    )


def _notes_on_folder(folder: Folder) -> Iterator[str]:
    if folder.config_dtype and folder.dtypes and folder.config_dtype != folder.dtypes[0][0]:
        yield (
            f"config.json names {folder.config_dtype}, the files hold {folder.dtypes[0][0]}: a loader may convert. "
            "Bytes are those of the files."
        )


def _notes_on_store(store: int, room: int | None) -> Iterator[str]:
    """Notes on a store of `store` bytes.

    Args:
        room: bytes that are free in /dev/shm of this machine; None if it does not exist.
    """
    if room is not None and room < store:
        yield (
            f"{containers.SHARED_MEMORY} of this machine has {format_bytes(room)} free, which is less than that store: Ray would "
            f"refuse it, or put it on disk. In a container, start it with --shm-size={store + store // 10}."
        )


def _totals(weights: Weights, workers: int, nodes: int) -> dict[str, Any]:
    return {
        "workers": workers,
        "nodes": nodes,
        "per_node": on_node(weights, workers).to_dict(),
        "all_nodes": on_nodes(weights, workers, nodes).to_dict(),
    }


def _lines(planned: _Planned, workers: int | None, nodes: int, store: int, notes: list[str]) -> Iterator[str]:
    yield planned.text
    rows = [(dtype, format_bytes(nbytes)) for dtype, nbytes in planned.dtypes]
    yield as_text(("dtype", "bytes"), rows, right=("bytes",))
    if workers is not None:
        places = [("per node", workers, on_node(planned.weights, workers))]
        places += [(f"{nodes} nodes", workers * nodes, on_nodes(planned.weights, workers, nodes))] if nodes > 1 else []
        cells = [
            (where, str(count), *map(format_bytes, (total.zerocopy, total.plain, total.saved)))
            for where, count, total in places
        ]
        headers = ("memory", "workers", "with zerocopy", "plain copies", "saved")
        yield as_text(headers, cells, right=headers[1:])
    yield (
        f"object_store_memory for each node: {store:,} bytes\n"
        f"  ray start --object-store-memory {store}    or    ray.init(object_store_memory={store})"
    )
    yield from notes
    if workers is None:
        yield "--workers N --nodes M tells what they take together."
