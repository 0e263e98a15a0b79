"""Guests without a virtual machine: a virtio-net driver and a small TCP/IP stack in this process.

    async with Guest("/tmp/vm1.sock", ip="10.0.0.1/24") as guest:
        print(await guest.ping("10.0.0.2", count=5))
        print(await guest.stream("10.0.0.2", seconds=5))

works over any vhost-user back-end: our switch, Open vSwitch with DPDK, testpmd. Packets are handled by threads of the
Rust half; the event loop is never kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viaduct.guest.errors import GuestError
    from viaduct.guest.guest import Guest
    from viaduct.guest.link import LinkOptions
    from viaduct.guest.results import Datagrams, Latency, Ping, Stream
    from viaduct.guest.traffic import Received, Receiver, Sender, Sent

__all__ = [
    "Datagrams",
    "Guest",
    "GuestError",
    "Latency",
    "LinkOptions",
    "Ping",
    "Received",
    "Receiver",
    "Sender",
    "Sent",
    "Stream",
]

# Where that stands. Loaded when first asked for: a machine needs what a MAC address is, and not a TCP/IP stack.
_WHERE = {
    "Datagrams": "results",
    "Guest": "guest",
    "GuestError": "errors",
    "Latency": "results",
    "LinkOptions": "link",
    "Ping": "results",
    "Received": "traffic",
    "Receiver": "traffic",
    "Sender": "traffic",
    "Sent": "traffic",
    "Stream": "results",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
