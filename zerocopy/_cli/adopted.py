"""How does a command publish, whose process needs no second copy of the weights?"""

from __future__ import annotations

from typing import Any

import zerocopy
from zerocopy.errors import IsolationError


def publish_adopted(pipeline: Any, **options: Any) -> Any:
    """Publish with `adopt=True`; without it where private mappings are not possible."""
    try:
        return zerocopy.publish(pipeline, adopt=True, **options)
    except IsolationError:
        return zerocopy.publish(pipeline, **options)
