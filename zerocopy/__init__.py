"""Share PyTorch models between Ray workers without copying them."""

from importlib.metadata import version as _version

from zerocopy import errors, testing
from zerocopy._cluster.following import Live
from zerocopy._cluster.handles import NamedPublication, Version
from zerocopy._cluster.listing import Publications, Published, publications
from zerocopy._cluster.publish import lookup, publish, publish_checkpoint, remove, set_alias, version_of
from zerocopy._cluster.refresh import refresh
from zerocopy._declare.fields import Copied, Field, Policy, Shared, copied, shared
from zerocopy._declare.pipeline import fields, pipeline
from zerocopy._load.live import unshare
from zerocopy._load.publication import Publication
from zerocopy._nodes.where import NodeCopies, NodeCopy
from zerocopy._publish.passing import install as _install
from zerocopy._publish.verify import plan
from zerocopy._run.actor import Actor, Launcher, actor
from zerocopy._run.methods import Handle, method, typed
from zerocopy._run.pool import Pool
from zerocopy._run.task import BoundTask, Task, task
from zerocopy._split.plan import PlanEntry, SharePlan
from zerocopy._wrap.extraction import extract_tensors, replace_tensors
from zerocopy.memory import MemoryReport, NodeMemory, ProcessMemory, PublicationMemory, memory_report
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
    "Handle",
    "Launcher",
    "Live",
    "MemoryReport",
    "NamedPublication",
    "NodeCopies",
    "NodeCopy",
    "NodeMemory",
    "PlanEntry",
    "Policy",
    "Pool",
    "ProcessMemory",
    "Publication",
    "PublicationMemory",
    "Publications",
    "Published",
    "SharePlan",
    "Shared",
    "Task",
    "Version",
    "actor",
    "copied",
    "errors",
    "fields",
    "lookup",
    "memory_report",
    "method",
    "pipeline",
    "plan",
    "publications",
    "publish",
    "publish_checkpoint",
    "refresh",
    "remove",
    "set_alias",
    "shared",
    "task",
    "testing",
    "typed",
    "unshare",
    "version_of",
]

# The imperative interface, for models that the user did not write.
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
        _public.__module__ = "zerocopy"  # its public place: pickles, help and errors name no private file

_install()
