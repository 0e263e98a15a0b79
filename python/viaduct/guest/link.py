"""The way from a driver in this process to a back-end: options, and the connection that is kept up.

A `Link` owns a `FrontEnd`. When the back-end goes away it takes the queues from whoever uses them, connects again as
soon as somebody listens, and gives new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from typing import Protocol

import msgspec

from viaduct._core import GuestMemory, guest_memory_size
from viaduct.guest.errors import GuestError
from viaduct.guest.ring_memory import held, used_index
from viaduct.vhost_user import FrontEnd, Queue, VhostUserError
from viaduct.vhost_user.ring import PACKED_START
from viaduct.virtio.features import DeviceFeature, NetFeature

log = logging.getLogger("viaduct.guest")

CONNECT_TIMEOUT = 5.0
"""Seconds in which a back-end has to appear, unless told otherwise."""
LARGEST_MTU = 65521
_FIRST_RETRY = 0.05
_LAST_RETRY = 0.25


class QueueUser(Protocol):
    """What the queues are for: a station, a traffic source or sink of the Rust half."""

    def prepare(
        self,
        memory: GuestMemory,
        features: int,
        data_addr: int,
        data_end: int,
        queues: list[tuple[int, int, int, int, int, int, int]],
    ) -> None:
        """Initializes the queues before the back-end hears of them. Raises `ValueError`."""

    def attach(self) -> None:
        """Begins to use them: the back-end has started. What is sent earlier it may throw away (vhost-user, "Ring
        states")."""

    def detach(self) -> None:
        """Lets go of them before it returns."""


class LinkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to drive the device. What the back-end does not offer is done without, unless it is the ring layout."""

    listen: bool = False
    """Listen on the socket for a back-end that connects, instead of connecting."""
    ring: str = "split"
    """``split`` or ``packed``."""
    queues: int = 1
    """Queue pairs."""
    queue_size: int = 256
    """Descriptors of each queue: for split rings a power of two, up to 32768."""
    mergeable: bool = True
    """Receive buffers may be joined for long frames."""
    event_idx: bool = True
    """Notifications are asked for by index."""
    indirect: bool = False
    """Descriptors of transmitted frames are indirect."""
    in_order: bool = False
    """The device uses buffers in order."""
    checksum: bool = True
    """Leave checksums to the device, and accept frames without."""
    segmentation: bool = True
    """Leave the cutting of TCP packets to the device, and accept uncut ones; needs `checksum`."""
    hugepages: bool = False
    """Take the memory from 2 MiB pages, which must be reserved."""
    mtu: int = 1500
    """Largest IP packet, up to 65521 bytes."""
    resume: bool = False
    """Keep the rings when the back-end goes, as a virtual machine has to, and let the next one go on with them."""
    track_inflight: bool = False
    """Keep the back-end's record of buffers in flight for the next one, if it offers that."""

    def features(self) -> int:
        """The virtio features to ask for. Raises `GuestError` for options that cannot work."""
        if self.ring not in ("split", "packed"):
            raise GuestError(f"ring {self.ring!r} must be split or packed (virtio 1.2, 2.7 and 2.8)")
        if not 1 <= self.queues <= 128:
            raise GuestError(f"{self.queues} queue pairs are not possible: 1 to 128")
        power_of_two = self.queue_size & (self.queue_size - 1) == 0
        if not 1 <= self.queue_size <= 32768 or (self.ring == "split" and not power_of_two):
            raise GuestError(
                f"queue size {self.queue_size} is not possible: a split ring takes a power of two up to 32768, a "
                "packed one 1 to 32768 (virtio 1.2, 2.7 and 2.8)"
            )
        if not 68 <= self.mtu <= LARGEST_MTU:
            raise GuestError(f"MTU {self.mtu} is not possible: 68 to {LARGEST_MTU}")
        wanted = int(DeviceFeature.VERSION_1)
        for chosen, bits in (
            (self.ring == "packed", DeviceFeature.RING_PACKED),
            (self.event_idx, DeviceFeature.EVENT_IDX),
            (self.indirect, DeviceFeature.INDIRECT_DESC),
            (self.in_order, DeviceFeature.IN_ORDER),
            (self.mergeable, NetFeature.MRG_RXBUF),
            (self.queues > 1, NetFeature.MQ | NetFeature.CTRL_VQ),
            (self.checksum, NetFeature.CSUM | NetFeature.GUEST_CSUM),
            (self.checksum and self.segmentation, NetFeature.HOST_TSO4 | NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6),
        ):
            if chosen:
                wanted |= int(bits)
        return wanted

    def required(self) -> int:
        """Those of the features without which there is nothing to do."""
        packed = DeviceFeature.RING_PACKED if self.ring == "packed" else 0
        return int(DeviceFeature.VERSION_1 | packed)


class Link:
    """A connection to a back-end that is kept up, and the queues over it."""

    def __init__(self, path: str, options: LinkOptions, name: str, user: QueueUser) -> None:
        """`user` gets the queues each time they have started, and loses them with the back-end.

        Raises `GuestError` for options that cannot work and `VhostUserError` for a path that cannot.
        """
        self.path = path
        self.options = options
        self.reconnects = 0
        """How often the back-end came back."""
        self._user = user
        features = options.features()
        sizes = [options.queue_size] * (2 * options.queues)
        self._front_end = FrontEnd(
            path,
            server=options.listen,
            features=features,
            required=options.required(),
            queue_count=len(sizes),
            queue_size=options.queue_size,
            memory_size=guest_memory_size(features, options.mtu, sizes),
            hugepages=options.hugepages,
            mtu=options.mtu if options.mtu != 1500 else None,
            track_inflight=options.track_inflight,
            name=name,
        )
        self._queues: tuple[Queue, ...] = ()
        self._front_end.on_layout = self._prepare
        self._up = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    @property
    def features(self) -> int:
        """The features negotiated with the back-end that is or was there."""
        return self._front_end.features

    @property
    def up(self) -> bool:
        """Whether the queues run."""
        return self._up.is_set()

    @property
    def back_end_pid(self) -> int | None:
        """Who is at the other end."""
        return None if self._front_end.peer is None else self._front_end.peer.pid

    async def start(self, within: float | None = CONNECT_TIMEOUT) -> None:
        """Connects, waiting at most `within` seconds for the back-end (None: for ever), and starts the queues.

        Raises `GuestError` if nobody is there or the back-end cannot be driven.
        """
        try:
            async with asyncio.timeout(within):
                await self._front_end.start()
        except TimeoutError:
            raise GuestError(self._nobody(within)) from None
        except VhostUserError as error:
            raise GuestError(str(error)) from error
        self._begin()
        self._watch = asyncio.create_task(self._keep_up(), name=f"link {self.path}")

    async def wait_up(self) -> None:
        """Returns when the queues run."""
        await self._up.wait()

    def broken(self, reason: str) -> None:
        """Says that the back-end broke the rings: the connection is made anew."""
        log.error("%s: %s; connecting again", self.path, reason)
        self._front_end.lost_reason = reason
        self._front_end.lost.set()

    async def close(self) -> None:
        """Takes the queues back and leaves the back-end. May be called twice."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        self._up.clear()
        self._user.detach()
        await self._front_end.close()

    def held_buffers(self) -> list[int]:
        """For each queue, how many buffers are the device's now; each is counted once. Read from the rings, which
        the driver changes meanwhile."""
        front = self._front_end
        packed = front.layout == "packed"
        return [len(set(held(front.memory_fd, queue, packed=packed))) for queue in self._queues]

    def _prepare(self, queues: tuple[Queue, ...]) -> None:
        front = self._front_end
        self._queues = queues
        memory = GuestMemory().with_region(0, front.memory_size, front.user_base, 0, front.memory_fd)
        base = front.user_base
        places = [
            (q.size, base + q.descriptor_addr, base + q.driver_addr, base + q.device_addr, q.base, q.kick_fd, q.call_fd)
            for q in queues
        ]
        try:
            self._user.prepare(memory, front.features, front.data_addr, front.memory_size, places)
        except ValueError as error:
            raise GuestError(f"{self.path}: {error}") from error

    def _begin(self) -> None:
        self._user.attach()
        self._up.set()

    async def _keep_up(self) -> None:
        """Connects again whenever the back-end has gone."""
        delay = _FIRST_RETRY
        while True:
            await self._front_end.lost.wait()
            self._up.clear()
            if not self.options.resume:
                self._user.detach()
            log.warning("%s: back-end lost (%s); waiting for it", self.path, self._front_end.lost_reason)
            while not self._up.is_set():
                try:
                    await (self._resume() if self.options.resume else self._restart())
                    delay = _FIRST_RETRY
                except (VhostUserError, GuestError, OSError) as error:
                    if not self.options.resume:
                        self._user.detach()
                    log.warning("%s: %s; trying again", self.path, error)
                    await asyncio.sleep(delay * random.uniform(0.8, 1.2))
                    delay = min(2 * delay, _LAST_RETRY)
            self.reconnects += 1
            log.warning("%s: back-end is back", self.path)

    async def _restart(self) -> None:
        await self._front_end.start()
        self._begin()

    async def _resume(self) -> None:
        """What QEMU does: a split ring goes on at its used index, a packed one where the device finds it."""
        front, features = self._front_end, self._front_end.features
        front.on_layout = None
        packed = front.layout == "packed"
        bases = [PACKED_START if packed else used_index(front.memory_fd, queue) for queue in self._queues]
        await front.start(bases)
        if front.features != features:
            raise GuestError(f"{self.path}: the features are others than before ({front.features:#x}, {features:#x})")
        for queue in self._queues:
            os.eventfd_write(queue.call_fd, 1)  # what the last back-end did it may not have announced
        self._up.set()

    def _nobody(self, within: float | None) -> str:
        if self.options.listen:
            return (
                f"{self.path}: no back-end connected in {within:g} s; point one here, for example "
                f"`viaduct switch --port a=vhost-user:{self.path},client`, or testpmd with "
                f"--vdev net_vhost0,iface={self.path},client=1"
            )
        return (
            f"{self.path}: nobody listens there after {within:g} s; start a back-end first, for example "
            f"`viaduct switch --port a=vhost-user:{self.path}`, or testpmd with --vdev net_vhost0,iface={self.path}"
        )
