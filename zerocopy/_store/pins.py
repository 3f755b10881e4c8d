"""What keeps an object in the store as long as this process uses its memory?

The store keeps an object for a process as long as the process has a buffer of it, and as long as their connection is open. When
`ray.shutdown()` closes the connection, the store can put other objects into the same memory, and mappings would show them. A
duplicate of the descriptor keeps the connection open.

A forked child has the buffers and descriptors of its parent. If it dropped a buffer, the store would release the object for the
parent. So buffers in a child live until the child ends. (`object_store` handles references.)
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

from zerocopy._compat import linux
from zerocopy._compat.cpython import make_immortal, warn_caller
from zerocopy._compat.ray import keep_while_connected, store_socket
from zerocopy._store import object_store
from zerocopy.errors import IsolationWarning


class Connection:
    """A duplicate of the descriptor of this process' connection to the store, in one session.

    It lives until the session has ended, and the last of its pins is gone.
    """

    def __init__(self, session: object, descriptor: int) -> None:
        self.session = session
        self.descriptor = descriptor

    def close(self) -> None:
        """Close the duplicate. This ends the connection, if Ray has closed its own descriptor."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _connection() -> Connection | None:
    """Return the connection of this session, created at the first call; None if none is found."""
    session, ours = object_store.session(), list(_connections)
    known = next((connection for connection in ours if connection.session is session), None)
    if known is not None or session is None or linux.why_no_mappings() is not None:
        return known
    descriptors = {connection.descriptor for connection in ours}
    original = next((fd for fd in linux.sockets_to(store_socket()) if fd not in descriptors), None)
    if original is None:
        warn_caller(
            "zerocopy does not find this process' connection to the object store. Loaded and adopted pipelines may change after "
            "ray.shutdown(). Call zerocopy.unshare(pipeline) before it.",
            IsolationWarning,
        )
        return None
    connection = Connection(session, os.dup(original))
    _connections.add(connection)
    keep_while_connected(connection)  # creating it again would take a while
    return connection


class Pin:
    """Keeps one object in the store for this process, as long as the pin lives.

    Attributes:
        buffers: Ray's buffers of the object.
        reference: reference that keeps the object for the cluster, if it is known.
    """

    def __init__(self, buffers: Sequence[Any], reference: Any = None) -> None:
        self.buffers = buffers
        self.reference = reference
        self._connection = _connection()
        _pins.add(self)


_pins: weakref.WeakSet[Pin] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pin in list(_pins):
        make_immortal(pin.buffers)
    for connection in list(_connections):
        connection.close()  # else it would outlive the parent's connection


os.register_at_fork(after_in_child=_after_fork_in_child)
