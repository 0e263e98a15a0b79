"""vhost-user: virtio devices over a UNIX socket, both sides of it.

`Backend` serves a `Device`; `QueueDevice` is the base for devices that answer requests in Python; `FrontEnd` drives any
back-end. ``docs/vhost-user.md`` says how the protocol is carried out and ``docs/devices.md`` how to write a device.
"""

from viaduct.vhost_user.backend import Backend, serve
from viaduct.vhost_user.device import Device, Inflight, Peer, Vring
from viaduct.vhost_user.errors import FrontEndError, RequestError, SocketPathError, StreamError, VhostUserError
from viaduct.vhost_user.protocol import ProtocolFeature

__all__ = [
    "Backend",
    "Device",
    "FrontEndError",
    "Inflight",
    "Peer",
    "ProtocolFeature",
    "RequestError",
    "SocketPathError",
    "StreamError",
    "VhostUserError",
    "Vring",
    "serve",
]
