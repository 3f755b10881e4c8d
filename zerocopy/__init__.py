"""Share PyTorch models between Ray workers without copying them."""

from importlib.metadata import version as _version

from zerocopy import errors, testing
from zerocopy._declare.fields import Copied, Field, Policy, Shared, copied, shared
from zerocopy._declare.pipeline import fields, pipeline
from zerocopy._load.live import unshare
from zerocopy._load.publication import Publication
from zerocopy._publish.checkpoint import publish_checkpoint
from zerocopy._publish.passing import install as _install
from zerocopy._publish.publish import publish
from zerocopy._publish.verify import plan
from zerocopy._run.actor import Actor, Launcher, Pool, actor
from zerocopy._run.task import BoundTask, Task, task
from zerocopy._split.plan import PlanEntry, SharePlan
from zerocopy._wrap.extraction import extract_tensors, replace_tensors
from zerocopy.memory import MemoryReport, ProcessMemory, memory_report
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

__version__ = _version("zerocopy-ray")

__all__ = [
    "Actor",
    "BoundTask",
    "Copied",
    "Field",
    "Launcher",
    "MemoryReport",
    "PlanEntry",
    "Policy",
    "Pool",
    "ProcessMemory",
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
    "publish_checkpoint",
    "shared",
    "task",
    "testing",
    "unshare",
]

# The imperative face, for models one did not write.
__all__ += [
    "ActorWrapper",
    "JITActorWrapper",
    "JITModelWrapper",
    "JITTaskWrapper",
    "ModelWrapper",
    "TaskWrapper",
    "extract_tensors",
    "load_model_in_actor",
    "load_pipeline_in_actor",
    "prepare_model_for_actors",
    "replace_tensors",
    "rewrite_pipeline",
    "rewrite_pipeline_for_actors",
]

for _public in map(globals().__getitem__, __all__):
    if isinstance(getattr(_public, "__module__", None), str) and _public.__module__.startswith("zerocopy."):
        _public.__module__ = "zerocopy"  # where it is found: pickles, help and errors name no private file

_install()
