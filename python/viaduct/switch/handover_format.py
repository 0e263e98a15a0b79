"""What one switch process tells the next when it hands over: the messages, as data.

Theory of operation
-------------------
The new process connects to the control socket of the old one and asks for `hand-over`, naming the formats that it can
read (`FORMATS`); the old one writes the highest that it knows too, and refuses if there is none. From then on the
connection carries the messages of this module, each a JSON object with a `kind`, and file descriptors beside them
(`handover_channel`); data name a descriptor by its place among those of their message.

    new                                                old
    Request(hand-over) ──────────────────────────────▶ no changes, no messages of front-ends from here on
                       ◀────────────────────────────── SwitchData, then a PortData for each port
    maps all memory, makes all ports, starts nothing   (goes on forwarding)
    Prepared           ──────────────────────────────▶ stops its pollers; every frame is dealt with
                       ◀────────────────────────────── PositionsData
    starts all rings, then its pollers
    Running            ──────────────────────────────▶ ends, and leaves sockets and files where they are

Until `PositionsData` has been sent, whatever goes wrong leaves the old process as it was. After that, if the new one
fails, the old one makes sure that it is dead and takes the rings up again as after a crash.

A format only grows: fields may be added with a default; a reader ignores those it does not know. A change that an older
reader would get wrong makes a new format.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from viaduct.vhost_user.handover import SessionData

from .config import SwitchConfig
from .sandbox import SandboxMode
from .status import Event

FORMATS = (1,)
"""Those that this version reads and writes, ascending."""


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Where the configuration came from: the arguments of `viaduct switch`, with which it can be read again."""

    ports: list[str] = []
    config: str | None = None
    pollers: str | None = None
    polling: str | None = None
    metrics: str | None = None
    log_format: Literal["text", "json"] | None = None
    sandbox: SandboxMode = "auto"
    sandbox_paths: tuple[str, ...] = ()
    control_group: str | None = None
    control_readers: str | None = None


class SwitchData(msgspec.Struct, frozen=True, kw_only=True, tag="switch", tag_field="kind"):
    """The switch itself. `configured` is what `sources` said when they were last read; `running` has what came by the
    control socket since. `environment`: the variables that belong to the service. `stdio`: standard input, output and
    errors. `directory`: where relative paths start."""

    format: int
    version: str
    pid: int
    running: SwitchConfig
    configured: SwitchConfig
    sources: Sources
    directory: str
    control_path: str
    control: int
    stdio: list[int]
    ports: int
    environment: dict[str, str] = {}
    events: list[Event] = []
    event_counts: dict[str, int] = {}


class PortData(msgspec.Struct, frozen=True, kw_only=True, tag="port", tag_field="kind"):
    """A port: what it has open. `taps`: the queues of an interface, with the offloads that it accepts
    and whether it was there before the switch. `replayed`: frames of its capture file by now."""

    name: str
    broken: str | None = None
    listener: int | None = None
    session: SessionData | None = None
    taps: list[int] = []
    accepted: list[str] = []
    interface_found: bool = False
    replayed: int = 0


class Counted(msgspec.Struct, frozen=True, array_like=True):
    """The counters of a queue in one direction, see `viaduct.switch.status.QueueStatistics`."""

    frames: int = 0
    bytes: int = 0
    drops: dict[str, int] = {}
    notifications: int = 0
    completed_offloads: int = 0


class PortPosition(msgspec.Struct, frozen=True, kw_only=True):
    """Where a port stopped. `rings`: base (as in GET_VRING_BASE) by number of the virtqueue. `replayed`: frames of its
    capture file. `broken`: as in `PortData`, if that has changed."""

    rings: dict[int, int] = {}
    broken: str | None = None
    received: list[Counted] = []
    sent: list[Counted] = []
    replayed: int = 0


class Station(msgspec.Struct, frozen=True, array_like=True):
    """An entry of the forwarding table. `age` in epochs."""

    mac: str
    vlan: int
    port: str
    age: int


class PositionsData(msgspec.Struct, frozen=True, kw_only=True, tag="positions", tag_field="kind"):
    """Where everything stands. `stopped`: when forwarding stopped, in seconds of the monotonic clock. `events`: what
    happened after `SwitchData`."""

    stopped: float
    events: list[Event] = []
    ports: dict[str, PortPosition] = {}
    stations: list[Station] = []


class Prepared(msgspec.Struct, frozen=True, tag="prepared", tag_field="kind"):
    """The new process has everything but the rings' positions."""


class Running(msgspec.Struct, frozen=True, tag="running", tag_field="kind"):
    """The new process forwards. `gap`: seconds for which nobody did."""

    gap: float


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="kind"):
    """The sender gives up, for this reason."""

    reason: str


HandoverMessage = SwitchData | PortData | PositionsData | Prepared | Running | Failed


def encode(message: HandoverMessage) -> bytes:
    """As JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes) -> HandoverMessage:
    """From JSON. Raises `msgspec.MsgspecError` for what is no message."""
    try:
        message: Any = msgspec.json.decode(data, type=HandoverMessage)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
    assert isinstance(message, HandoverMessage)
    return message
