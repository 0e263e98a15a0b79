"""vhost-user: virtio devices over a UNIX socket, both sides of it.

`Backend` serves a `Device`; `QueueDevice` is the base for devices that answer requests in Python; `FrontEnd` drives any
back-end. ``docs/vhost-user.md`` says how the protocol is carried out and ``docs/devices.md`` how to write a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from viaduct.vhost_user.device import Device, Inflight, Peer, Transport, Vring
from viaduct.vhost_user.errors import FrontEndError, RequestError, SocketPathError, StreamError, VhostUserError
from viaduct.vhost_user.protocol import ProtocolFeature

if TYPE_CHECKING:
    from viaduct.vhost_user.backend import Backend, serve
    from viaduct.vhost_user.frontend import FrontEnd, Queue
    from viaduct.vhost_user.queue_device import QueueDevice

__all__ = [
    "Backend",
    "Device",
    "FrontEnd",
    "FrontEndError",
    "Inflight",
    "Peer",
    "ProtocolFeature",
    "Queue",
    "QueueDevice",
    "RequestError",
    "SocketPathError",
    "StreamError",
    "Transport",
    "VhostUserError",
    "Vring",
    "serve",
]

# A switch that only serves guests does not pay for the front-end at its start, nor a machine for either side.
_ON_DEMAND = {
    "Backend": "backend",
    "FrontEnd": "frontend",
    "Queue": "frontend",
    "QueueDevice": "queue_device",
    "serve": "backend",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)
