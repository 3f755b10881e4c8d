"""Does `python tests/live_update.py` succeed: twenty versions rolled out under load, and two rolled back?"""

from __future__ import annotations

import json

import pytest
from conftest import HERE, ORDINARY, run_python


@pytest.mark.long
@pytest.mark.alone
def test_a_live_update_under_load() -> None:
    """Under load no call fails or mixes versions, all readers reach the last version, and the store has only kept versions."""
    done = run_python("", str(HERE / "live_update.py"), **ORDINARY)
    assert done.returncode == 0, done.stderr
    report, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])
    assert report["failures"] == []
    kinds = report["kinds"]
    assert kinds.keys() == {
        "following 0", "following 1", "async", "threaded", "stream", "serve", "map_batches", "map", "task",
    }  # fmt: skip
    assert {seen["failed"] + seen["mixed"] for seen in kinds.values()} == {0}
    assert all(seen["calls"] > 0 for seen in kinds.values())
    assert report["all answer the last version"]
    assert min(kinds[kind]["versions"] for kind in ("following 0", "following 1", "threaded")) > 10
    assert report["versions kept"] == 3
    assert report["store over what is kept"] < 1.8
