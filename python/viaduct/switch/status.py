"""What a running switch says of itself: immutable snapshots, the same in Python, on the control socket and in `--json`.

Directions are the switch's: *received* frames came in from a port (its guest sent them), *sent* frames went out to it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Link = Literal["up", "down", "broken"]
"""`up`: frames can pass. `down`: nobody is connected, or the driver has not started. `broken`: detached."""

Direction = Literal["received", "sent"]

Level = Literal["info", "warning", "error"]
"""How bad an event is. `warning`: somebody is refused or has lost the network. `error`: something is broken."""


class Peer(msgspec.Struct, frozen=True):
    """The process at the other end of a port's socket, as the kernel vouches for it (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int


class Iommu(msgspec.Struct, frozen=True):
    """What an IOMMU in front of a port's guest has told the switch, since it was negotiated.

    `ranges`: translations known now, adjacent pages together. `refused`: misses for which there was no translation.
    """

    ranges: int
    updates: int
    invalidations: int
    misses: int
    refused: int


class PortStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One port as it is now.

    `config`: its short form, `vhost-user:/run/vm1.sock,queues=2`. `queues`: queue pairs in use. `features`: names of
    the features that both sides agreed on. `ring`: layout of its virtqueues. `iommu`: if the guest's addresses are
    translated. `detail`: why the link is not up. `retry_in`: seconds until the switch tries again by itself, where it
    does.
    """

    name: str
    kind: str
    config: str
    link: Link
    queues: int = 0
    peer: Peer | None = None
    ring: str | None = None
    features: tuple[str, ...] = ()
    mtu: int | None = None
    iommu: Iommu | None = None
    detail: str | None = None
    retry_in: float | None = None


class QueueStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What one queue of a port has carried since the port was added. Bytes are without virtio-net headers.

    `drops`: frames that went no further, by reason; reasons that never happened are left out.
    `notifications`: signals sent to the driver. `completed_offloads`: frames whose checksum or segmentation the switch
    had to complete.
    """

    queue: int
    direction: Direction
    frames: int = 0
    bytes: int = 0
    drops: dict[str, int] = {}
    notifications: int = 0
    completed_offloads: int = 0


class PortStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What one port has carried, queue by queue, and in sum.

    `macs`: addresses that are known behind it. `unlearned`: frames whose source was not learned, because the port has
    as many as it may have. `moved`: addresses that came to it from another port. `rate_waits`: times that it had to
    wait because it sends faster than its `rate` or `pps`.
    """

    name: str
    kind: str
    link: Link
    queues: tuple[QueueStatistics, ...] = ()
    macs: int = 0
    unlearned: int = 0
    moved: int = 0
    rate_waits: int = 0

    def frames(self, direction: Direction) -> int:
        """Frames carried in one direction."""
        return sum(queue.frames for queue in self.queues if queue.direction == direction)

    def bytes(self, direction: Direction) -> int:
        """Bytes carried in one direction, without virtio-net headers."""
        return sum(queue.bytes for queue in self.queues if queue.direction == direction)

    def drops(self, direction: Direction | None = None) -> dict[str, int]:
        """Frames dropped by reason, in one direction or both."""
        total: dict[str, int] = {}
        for queue in self.queues:
            if direction in (None, queue.direction):
                for reason, count in queue.drops.items():
                    total[reason] = total.get(reason, 0) + count
        return total


class PollerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What one poller thread has done.

    `busy_seconds`: time in rounds that moved frames, `idle_seconds` in rounds that found none; the rest it slept.
    `busy_cycles`: the first in processor ticks, so that `busy_cycles / frames` is what a frame costs. `batches`:
    batches of 1, 2-3, 4-7, ... 64 frames. `sleeps`: times it went to sleep, `wakeups`: those that a frame ended.
    `active_queues` of its `queues` are polled, the others will notify.
    """

    poller: int
    cpu: int | None = None
    frames: int = 0
    rounds: int = 0
    sleeps: int = 0
    wakeups: int = 0
    active_queues: int = 0
    busy_seconds: float = 0.0
    idle_seconds: float = 0.0
    busy_cycles: int = 0
    batches: tuple[int, ...] = ()
    queues: int = 0


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """All counters of a switch at one moment. `time` is monotonic, in seconds: rates are differences divided by its."""

    time: float
    ports: tuple[PortStatistics, ...] = ()
    pollers: tuple[PollerStatistics, ...] = ()


class MacEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A learned address: `mac` as text, `vlan` 0 where untagged, `age` in seconds since it was last seen."""

    mac: str
    vlan: int
    port: str
    age: float


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something happened: `time` in seconds since 1970, `kind` one of the words below, `message` for people.

    `sequence`: the number of the event, counted from 1 without gaps. Kinds: `port-added`, `port-removed`,
    `port-changed`, `port-broken`, `peer-connected`, `peer-disconnected`, `peer-refused`, `request-refused`, `link-up`,
    `link-down`, `option-changed`, `sandbox`, `sandbox-incomplete`, `syscall-refused`, `error`.
    """

    time: float
    kind: str
    message: str
    port: str | None = None
    level: Level = "info"
    sequence: int = 0


class Frame(NamedTuple):
    """A captured frame: nanoseconds since 1970, its port, direction, length on the wire, and its (first) bytes."""

    time_ns: int
    port: str
    direction: Direction
    length: int
    data: bytes
