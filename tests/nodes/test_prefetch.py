"""Does prefetching bring weights to a node before the first load there, and do they stay until they are released?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import prefetching
import pytest
from clusters import outcomes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def held() -> Callable[[str], None]:
    return outcomes(str(Path(prefetching.__file__)))


@pytest.mark.parametrize("check", [name for name in vars(prefetching) if name.startswith("check_")])
def test_on_four_nodes(check: str, held: Callable[[str], None]) -> None:
    held(check)
