"""How are storages grouped into shards and buffers? These tests need no cluster."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

from zerocopy._store.mapping import start_of, starts_of
from zerocopy._store.storages import storage_of
from zerocopy._store.write import ALIGNMENT, FIELD_SHARD, MB, ORDINARY, PACKED, PACKS_PER_SHARD, buffers_for, layout


@given(st.lists(st.sampled_from([0, 1, 1000, PACKED, MB, 70 * MB]), max_size=60), st.data())
def test_every_storage_has_one_place(sizes: list[int], data: st.DataObject) -> None:
    """Each storage with bytes is in exactly one shard, in order, and no shard is larger than necessary."""
    ends = data.draw(st.lists(st.integers(0, len(sizes)), max_size=4))
    shards = layout(sizes, ends)
    flat = [index for shard in shards for index in shard]
    assert flat == sorted(set(flat))
    assert {index for index, size in enumerate(sizes) if size} <= set(flat)
    limit = max(ORDINARY.least, sum(sizes) // ORDINARY.parts)
    for shard in shards:
        assert sum(sizes[index] for index in shard) <= limit or sum(sizes[index] > 0 for index in shard) == 1
        assert sum(sizes[index] for index in shard if sizes[index] < PACKED) <= PACKS_PER_SHARD + PACKED


def test_fields_get_shards_of_their_own() -> None:
    """A large field has its own shard, so that it can be fetched alone; small fields share a shard."""
    assert layout([FIELD_SHARD, 10, 20], [1, 2, 3]) == [[0], [1, 2]]
    assert layout([10, 20, 30], [1, 2, 3]) == [[0, 1, 2]]


def test_layout_packs_small_storages() -> None:
    """Each large storage is one buffer, without a copy; small storages share an aligned buffer."""
    large = torch.zeros(PACKED, dtype=torch.uint8)
    small = [torch.full((5,), number, dtype=torch.uint8) for number in range(3)]
    buffers, places = buffers_for([storage_of(tensor) for tensor in (small[0], large, small[1], small[2])])
    assert places == [(2, 0), (1, 0), (2, ALIGNMENT), (2, 2 * ALIGNMENT)]
    assert [bytes(buffers[2].raw()[offset : offset + 5]) for _, offset in (places[0], *places[2:])] == [
        bytes([number] * 5) for number in range(3)
    ]
    large[0] = 9
    assert buffers[1].raw()[0] == 9


def test_addresses_are_not_taken_on_trust() -> None:
    """Buffer addresses are computed from Ray's layout if the last buffer confirms it, else read from each buffer."""
    memory = np.zeros(3000, np.uint8)
    first = ALIGNMENT - start_of(memory) % ALIGNMENT
    laid_out = [memory[first : first + 10], memory[first + 64 : first + 164], memory[first + 192 : first + 200]]
    assert starts_of(laid_out) == [start_of(memory) + first + offset for offset in (0, 64, 192)]
    in_the_gap = [memory[first : first + 16], memory[first + 16 : first + 80], memory[first + 128 : first + 2300]]
    assert starts_of(in_the_gap) == [start_of(memory) + first + offset for offset in (0, 16, 128)]
    elsewhere = [laid_out[0], laid_out[2], laid_out[1]]
    assert starts_of(elsewhere) == [start_of(memory) + first + offset for offset in (0, 192, 64)]
