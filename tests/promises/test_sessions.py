"""What happens when the store is full, and when connections to Ray end?"""

from __future__ import annotations

import pytest
from conftest import run_python

PROGRAM = """
import sys, warnings
import numpy as np, ray, torch
import pipelines, zerocopy
from zerocopy.testing import assert_zero_copy

def start(address, **options):
    warnings.simplefilter("default")
    ray.init(address, logging_level="ERROR", log_to_driver=False, **options)
    warnings.simplefilter("error")

start("local", num_cpus=1, object_store_memory=100_000_000, include_dashboard=False)
search = pipelines.search(width=256)
publication = zerocopy.publish(search)
loaded = publication.load()

pinned = [ray.get(ray.put(np.ones(8_000_000, dtype=np.uint8))) for _ in range(11)]
big = pipelines.encoder(2048)
crowded = zerocopy.publish(big).load()
assert_zero_copy(crowded)
with torch.no_grad():
    crowded[0].bias.add_(1)
print("crowded", torch.equal(crowded[0].weight, big[0].weight))
del pinned, crowded

ray.shutdown()
print("after shutdown", loaded(1.0) == search(1.0))
for connected in (False, True):
    if connected:
        start(sys.argv[1])
    try:
        publication.load()
    except zerocopy.errors.PublicationLostError as error:
        print(error, ray.is_initialized())
print("again", pipelines.answer(search, 1.0) == pipelines.answer(loaded, 1.0) == search(1.0))
assert_zero_copy(zerocopy.publish(search).load())
"""


@pytest.mark.long
def test_crowded_stores_and_ended_sessions(address: str) -> None:
    """A model larger than the store's free memory is mapped from a file, and loaded pipelines work after `ray.shutdown()`."""
    # After `ray.shutdown()` loads of a publication raise an error, and a new session can publish the pipelines again.
    done = run_python(PROGRAM, "-", address)
    lost = "This publication of Search belongs to a connection to Ray that has ended. Hint: publish the pipeline again."
    assert done.stdout.splitlines() == [
        "crowded True",
        "after shutdown True",
        f"{lost} False",
        f"{lost} True",
        "again True",
    ], done.stderr
