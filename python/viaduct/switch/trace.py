"""The next packets of a port as they stand in its rings.

Two looks at the same thing: `received`, the guest's transmit queue, shows what the guest gave and where it was sent;
`sent`, its receive queue, shows the buffers that the guest lent and what was written into them. Descriptors are shown
as the driver wrote them; a driver that rewrites them meanwhile deceives only the reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from .config import ConfigError, VhostUserPort
from .event_fd import event_fd_of
from .packet_summary import describe_frame, describe_header
from .status import Direction

if TYPE_CHECKING:
    from .switch import Switch

COUNT_MAX = 10_000
"""Most packets of one trace."""

_FLAGS = ((1, "next"), (2, "write"), (4, "indirect"), (1 << 7, "avail"), (1 << 15, "used"))
"""virtio 1.2, 2.7.5 and 2.8.1."""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """A descriptor as the driver wrote it. `in_table`: in the indirect table of the one before."""

    index: int
    address: int
    length: int
    flags: tuple[str, ...] = ()
    in_table: bool = False


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """One packet of a ring.

    `queue`: virtqueue. `position`: in the available ring, or in the packed one. `head`: first descriptor of the chain
    (split), or buffer id (packed). `length`: with the virtio-net header; of a sent packet, that of its buffers.
    `header`: the header in words. `frame`: the frame in one line. `outcome`: where it went, or why it was dropped.
    """

    time_ns: int
    port: str
    direction: Direction
    queue: int
    position: int
    head: int
    length: int
    descriptors: tuple[Descriptor, ...]
    header: str
    frame: str
    outcome: str


async def trace(switch: Switch, name: str, count: int) -> AsyncGenerator[Packet]:
    """The next `count` packets of a port, both directions, until all were shown or the port goes.

    Raises:
        ConfigError: there is no such port, or it has no rings.
    """
    from viaduct._core import Trace, trace_port, untrace_port

    switch.config.without_port(name)  # raises with the nearest name if there is none
    if not isinstance(switch.config.ports[name], VhostUserPort):
        raise ConfigError(
            f"a {switch.config.ports[name].kind} port has no rings to look into; its frames: viaduct capture {name}",
            ("ports", name),
        )
    if not 1 <= count <= COUNT_MAX:
        raise ConfigError(f"{count} packets is outside 1 to {COUNT_MAX}")
    port = switch.members[name]
    number = port.number
    arrived = asyncio.Event()
    port.on_close.append(arrived.set)
    with event_fd_of(asyncio.get_running_loop(), arrived.set) as event_fd:
        traced = Trace(count, event_fd)
        trace_port(switch.data_path, number, traced)
        try:
            while count > 0 and port.number >= 0:
                await arrived.wait()
                arrived.clear()
                names = {each.number: its_name for its_name, each in switch.members.items()}
                for packet in traced.take():
                    yield _packet(name, packet, names)
                    count -= 1
        finally:
            with suppress(ValueError, RuntimeError):  # the port or the switch may be gone
                untrace_port(switch.data_path, number, traced)
            port.on_close.remove(arrived.set)


def _packet(
    name: str,
    packet: tuple[int, int, int, int, list[tuple[int, bool, int, int, int]], int, int, bytes, tuple[str, int, int]],
    names: dict[int, str],
) -> Packet:
    time_ns, queue, position, head, descriptors, header_len, length, data, (word, number, target) = packet
    match word:
        case "written":
            outcome = "written into these buffers"
        case "forwarded":
            outcome = f"to port {names.get(number, number)}, queue {2 * target}"
        case "flooded":
            outcome = "to every other port of its VLAN"
        case _:
            outcome = f"dropped: {word}"
    return Packet(
        time_ns=time_ns,
        port=name,
        direction="sent" if queue % 2 == 0 else "received",
        queue=queue,
        position=position,
        head=head,
        length=length,
        descriptors=tuple(
            Descriptor(
                index=index,
                address=address,
                length=size,
                flags=tuple(flag for bit, flag in _FLAGS if flags & bit),
                in_table=in_table,
            )
            for index, in_table, address, size, flags in descriptors
        ),
        header=describe_header(data[:header_len]),
        frame=describe_frame(data[header_len:]),
        outcome=outcome,
    )
