"""Are all answers right under heavy load? The program of `nox -s soak` with smaller numbers checks it."""

from __future__ import annotations

import load_held
import pytest

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]


def test_a_crowd_gets_right_answers() -> None:
    """All answers are right when actors load at once, many calls run, drivers publish under one name, and versions change."""
    found = list(load_held.outcomes(actors=6, calls=100, items=300, turns=3, seconds=5))
    assert [one.wrong for one in found] == [0] * 5, found
    assert all(one.count > 5 for one in found)
