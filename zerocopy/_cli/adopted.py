"""How does a command publish without keeping a second copy of the weights in its process?"""

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
