"""Share PyTorch models between Ray workers without copying them."""

from zerocopy import _passing as _passing
from zerocopy._fields import Copied, Field, Shared, copied, shared
from zerocopy._pipeline import fields, pipeline
from zerocopy._plan import PlanEntry, SharePlan, plan
from zerocopy._publication import Publication
from zerocopy._publishing import publish, unshare

__all__ = [
    "Copied",
    "Field",
    "PlanEntry",
    "Publication",
    "SharePlan",
    "Shared",
    "copied",
    "fields",
    "pipeline",
    "plan",
    "publish",
    "shared",
    "unshare",
]
