"""How do bytes get from main memory to a device?

CUDA's driver copies ordinary memory into its own pinned memory, and the GPU reads it from there. The driver uses one thread for
the copy, and a load would wait for this thread. So here, several threads do the same copy.
"""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch

from zerocopy._store.storages import Region
from zerocopy._store.tensors import base_over

MB = 1 << 20
LEAST = 128 * MB  # fewer bytes are not worth the threads
PIECE = 4 * MB  # pinned memory of each thread; torch keeps it for later
THREADS = 4

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # bytes on a GPU, and the bytes to copy there


def upload(regions: Mapping[int, Region], devices: Mapping[int, torch.device]) -> dict[int, Region]:
    """Copy the regions of some storages to devices, given the device of each storage. Returns the copies."""
    uploaded: dict[int, Region] = {}
    pairs: dict[torch.device, list[Pair]] = defaultdict(list)
    with torch.inference_mode(False), torch.no_grad():
        for storage, device in devices.items():
            source = base_over(regions[storage], torch.uint8)
            copied = torch.empty_like(source, device=device)
            uploaded[storage] = copied, 0, source.nbytes
            pairs[device].append((copied, source))
        for device, members in pairs.items():
            is_large = sum(source.nbytes for _, source in members) >= LEAST
            if is_large and device.type == "cuda":
                _copy_by_threads(members, torch.cuda.current_stream(device))
            else:
                for copied, source in members:
                    copied.copy_(source)
    return uploaded


def _copy_by_threads(pairs: Sequence[Pair], stream: torch.cuda.Stream) -> None:
    pieces = [piece for copied, source in pairs for piece in zip(copied.split(PIECE), source.split(PIECE), strict=True)]
    count = min(THREADS, os.cpu_count() or 1)

    def copy(share: Sequence[Pair]) -> None:
        pinned = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(stream), torch.no_grad():
            for copied, source in share:
                ctypes.memmove(pinned.data_ptr(), source.data_ptr(), source.nbytes)
                copied.copy_(pinned[: source.nbytes])  # waits until the GPU has it

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(copy, [pieces[start::count] for start in range(count)]))
