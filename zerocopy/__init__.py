"""Share PyTorch models between Ray workers without copying them."""

from zerocopy import _passing as _passing
from zerocopy import errors
from zerocopy._actor import Actor, Pool, actor
from zerocopy._fields import Copied, Field, Policy, Shared, copied, shared
from zerocopy._pipeline import fields, pipeline
from zerocopy._plan import PlanEntry, SharePlan, plan
from zerocopy._publication import Publication
from zerocopy._publishing import publish, unshare
from zerocopy._task import Task, task
from zerocopy.memory import memory_report

__all__ = [
    "Actor",
    "Copied",
    "Field",
    "PlanEntry",
    "Policy",
    "Pool",
    "Publication",
    "SharePlan",
    "Shared",
    "Task",
    "actor",
    "copied",
    "errors",
    "fields",
    "memory_report",
    "pipeline",
    "plan",
    "publish",
    "shared",
    "task",
    "unshare",
]
