"""What happens when Ray serializes a pipeline? It travels as a publication and arrives loaded."""

from __future__ import annotations

from typing import Any

from zerocopy._compat.ray import is_serializing, register_reducer
from zerocopy._declare import pipeline
from zerocopy._load.publication import Publication
from zerocopy._publish.publish import belongs_to_another, has_name, publish_automatically
from zerocopy._split.introspect import Subject, introspect
from zerocopy._split.reducers import reduce_as_pickle
from zerocopy._store import object_store
from zerocopy.errors import OutOfBandError


def _reduce(pipeline: Any) -> Any:
    if not object_store.is_running():
        return reduce_as_pickle(pipeline)
    if has_name(pipeline):
        return _load, (publish_automatically(pipeline),)
    try:
        what = f"A pipeline of class {type(pipeline).__name__}"
        object_store.check_out_of_band(what, lambda: not belongs_to_another(pipeline))
    except OutOfBandError:
        # A CannotTravelError comes first: to explain an error of pickle, Ray pickles the pipeline again, out of band.
        introspect(Subject(pipeline))
        raise
    return _load, (publish_automatically(pipeline),)


def _load(publication: Publication) -> Any:
    return publication.load()


def _reduce_publication(publication: Publication) -> Any:
    reduced = publication.reduce()
    if object_store.is_running() and not is_serializing() and not publication.travels_by_name():
        publication.check_out_of_band()
        object_store.count_pin(publication.reference)  # Ray pickles this reference next
    return reduced


def _register(cls: type) -> None:
    register_reducer(cls, _reduce)


def register_handle(cls: type[Publication]) -> None:
    """Register a class of publications with Ray's pickle."""
    register_reducer(cls, _reduce_publication)


def install() -> None:
    """Register publications, and every pipeline class from now on, with Ray's pickle."""
    register_handle(Publication)
    pipeline.install(_register)
