"""What happens when Ray serializes a pipeline: it travels as a publication and arrives loaded."""

from __future__ import annotations

from typing import Any

from zerocopy._compat.ray import register_reducer
from zerocopy._declare.pipeline import observe_pipeline_classes
from zerocopy._load.publication import Publication, unpacked
from zerocopy._publish.publish import publish_automatically
from zerocopy._split.introspect import Subject, introspect
from zerocopy._store import object_store
from zerocopy.errors import OutOfBandError


def _reduce(pipeline: Any) -> Any:
    if not object_store.is_running():
        return pipeline.__reduce_ex__(5)
    try:
        object_store.refuse_out_of_band(f"A pipeline of class {type(pipeline).__name__}")
    except OutOfBandError:
        introspect(
            Subject(pipeline)
        )  # what cannot travel at all says so first: Ray asks again this way to explain an error
        raise
    return _load, (publish_automatically(pipeline),)


def _load(publication: Publication) -> Any:
    return publication.load()


def _reduce_publication(publication: Publication) -> Any:
    packed = publication.packed()
    if object_store.is_running():
        object_store.refuse_out_of_band(f"A publication of {publication.kind}")
        object_store.count_pin(publication.reference)  # which Ray pickles next
    return (Publication, publication.parts()) if packed is None else (unpacked, (publication.reference, packed))


def _register(cls: type) -> None:
    register_reducer(cls, _reduce)


register_reducer(Publication, _reduce_publication)
observe_pipeline_classes(_register)
