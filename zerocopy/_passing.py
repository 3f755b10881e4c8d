"""What happens when Ray serializes a pipeline: it travels as a publication and arrives loaded."""

from __future__ import annotations

from typing import Any

import ray.cloudpickle

from zerocopy import _store
from zerocopy._introspector import Subject, introspect
from zerocopy._pipeline import observe_pipeline_classes
from zerocopy._publication import Publication, unpacked
from zerocopy._publishing import publish_automatically
from zerocopy.errors import OutOfBandError


def _reduce(pipeline: Any) -> Any:
    if not _store.is_running():
        return pipeline.__reduce_ex__(5)
    try:
        _store.refuse_out_of_band(f"A pipeline of class {type(pipeline).__name__}")
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
    if _store.is_running():
        _store.refuse_out_of_band(f"A publication of {publication.kind}")
        _store.count_pin(publication.reference)  # which Ray pickles next
    return (Publication, publication.parts()) if packed is None else (unpacked, (publication.reference, packed))


def _register(cls: type) -> None:
    # What ray.util.register_serializer does, for a process that is not connected yet; receivers need no registration.
    ray.cloudpickle.CloudPickler.dispatch[cls] = _reduce


ray.cloudpickle.CloudPickler.dispatch[Publication] = _reduce_publication
observe_pipeline_classes(_register)
