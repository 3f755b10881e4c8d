"""Does the integrity run of `nox -s soak` succeed for a few seconds?"""

from __future__ import annotations

import pytest
import soak


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_weights_stay_what_they_are_under_churn() -> None:
    """Every reader finds only the weights of its version, while others load, write, pass on, adopt, fork and close."""
    found = soak.run(4.0, seed=1, workers=1)
    assert not [what for what in found if what.startswith("WRONG")]
    assert {
        "loaded",
        "held",
        "handed on after a write",
        "a call of a task",
        "passed again after a write",
    } <= found.keys()
