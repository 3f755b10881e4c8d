"""A crowd at one moment: the program of `nox -s soak`, with smaller numbers."""

from __future__ import annotations

import load_held
import pytest

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]


def test_a_crowd_gets_right_answers() -> None:
    """Actors that load at one moment, calls in flight, items through `map`, rivals of one name, and churn with new versions."""
    found = list(load_held.outcomes(actors=6, calls=100, items=300, turns=3, seconds=5))
    assert [one.wrong for one in found] == [0] * 5, found
    assert all(one.count > 5 for one in found)
