"""Share PyTorch models between Ray workers without copying them."""

from zerocopy import _passing as _passing
from zerocopy import errors
from zerocopy._actor import Actor, Pool, actor
from zerocopy._checkpoint import publish_checkpoint
from zerocopy._extraction import extract_tensors, replace_tensors
from zerocopy._fields import Copied, Field, Policy, Shared, copied, shared
from zerocopy._pipeline import fields, pipeline
from zerocopy._plan import PlanEntry, SharePlan, plan
from zerocopy._publication import Publication
from zerocopy._publishing import publish, unshare
from zerocopy._task import Task, task
from zerocopy.memory import memory_report
from zerocopy.wrappers import (
    ActorWrapper,
    JITActorWrapper,
    JITModelWrapper,
    JITTaskWrapper,
    ModelWrapper,
    TaskWrapper,
    load_model_in_actor,
    load_pipeline_in_actor,
    prepare_model_for_actors,
    rewrite_pipeline,
    rewrite_pipeline_for_actors,
)

__all__ = [
    "Actor",
    "ActorWrapper",
    "Copied",
    "Field",
    "JITActorWrapper",
    "JITModelWrapper",
    "JITTaskWrapper",
    "ModelWrapper",
    "PlanEntry",
    "Policy",
    "Pool",
    "Publication",
    "SharePlan",
    "Shared",
    "Task",
    "TaskWrapper",
    "actor",
    "copied",
    "errors",
    "extract_tensors",
    "fields",
    "load_model_in_actor",
    "load_pipeline_in_actor",
    "memory_report",
    "pipeline",
    "plan",
    "prepare_model_for_actors",
    "publish",
    "publish_checkpoint",
    "replace_tensors",
    "rewrite_pipeline",
    "rewrite_pipeline_for_actors",
    "shared",
    "task",
    "unshare",
]
