"""Drives a device without a socket and without a guest: as the transport of a machine would, with a driver's side of
every queue in the test's hands.

Memory is one memfd at guest address 0, and user addresses equal guest addresses. Each queue has a part of it: its
rings, then places of `PLACE` bytes for buffers, one for each token.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from types import TracebackType
from typing import Literal, Self

from viaduct._core import DriverQueue, GuestMemory, ring_parts
from viaduct.vhost_user import Device, Vring
from viaduct.virtio import DeviceFeature, Status

PLACE = 8192
PART = 1 << 20
RING = 1 << 16
PATIENCE = 30.0


class Ring:
    """One queue, from the driver's side."""

    def __init__(self, slot: Slot, index: int, features: int, size: int) -> None:
        self.slot, self.index, self.size = slot, index, size
        self.packed = bool(features & DeviceFeature.RING_PACKED)
        self.event_idx = bool(features & DeviceFeature.EVENT_IDX)
        self.start = slot.first_part + index * PART
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        addresses, at = [], self.start
        for length, align in ring_parts(self.layout, size, event_idx=self.event_idx):
            at = -(-at // align) * align
            addresses.append(at)
            at += length
        assert at <= self.start + RING
        self.addresses = addresses
        self.base = 0x8000_8000 if self.packed else 0
        self.core = self._driver()
        self.free = deque(range((PART - RING) // PLACE))
        self.used: deque[tuple[int, bytes]] = deque()
        """What came back: token, and the bytes that the device wrote."""
        self._called = asyncio.Event()
        self._rooms: dict[int, list[tuple[int, int]]] = {}
        asyncio.get_running_loop().add_reader(self.call_fd, self._call)

    @property
    def layout(self) -> Literal["split", "packed"]:
        return "packed" if self.packed else "split"

    def _driver(self) -> DriverQueue:
        return DriverQueue(
            self.slot.memory,
            layout="packed" if self.packed else "split",
            size=self.size,
            descriptor_addr=self.addresses[0],
            driver_addr=self.addresses[1],
            device_addr=self.addresses[2],
            event_idx=self.event_idx,
        )

    def place(self, token: int) -> int:
        """The guest address of a token's place."""
        return self.start + RING + token * PLACE

    def add(self, out: bytes | list[bytes] = b"", room: int | list[int] = 0, kick: bool = True) -> int:
        """Makes one buffer available: the elements to read, then the room of the elements to write."""
        outs = [out] if isinstance(out, bytes) else out
        rooms = [room] if isinstance(room, int) else room
        token = self.free.popleft()
        at, readable, writable = self.place(token), [], []
        for data in outs:
            if data:
                self.slot.memory.write(at, data)
                readable.append((at, len(data)))
                at += len(data)
        for length in rooms:
            if length:
                writable.append((at, length))
                at += length
        assert at <= self.place(token) + PLACE
        self.add_at(readable, writable, token, kick)
        return token

    def add_at(
        self, readable: list[tuple[int, int]], writable: list[tuple[int, int]], token: int, kick: bool = True
    ) -> None:
        """Makes a buffer of elements anywhere available."""
        self._rooms[token] = writable
        assert self.core.add(readable, writable, token)
        if kick:
            self.kick()

    def kick(self) -> None:
        """Shows the device what was added, and notifies it if it wants that."""
        if self.core.kick():
            os.eventfd_write(self.kick_fd, 1)

    def _call(self) -> None:
        os.eventfd_read(self.call_fd)
        self.collect()
        self._called.set()

    def collect(self) -> None:
        """Takes what came back."""
        while True:
            while (taken := self.core.take()) is not None:
                token, written = taken
                data = b""
                for addr, length in self._rooms.pop(token):
                    data += self.slot.memory.read(addr, min(length, written - len(data)))
                self.used.append((token, data))
                if token < (PART - RING) // PLACE:
                    self.free.append(token)
            if not self.core.enable_notifications():
                return

    def arrived(self) -> int:
        """How many buffers have come back and were not asked for."""
        self.collect()
        return len(self.used)

    async def next_used(self) -> tuple[int, bytes]:
        """The next buffer that comes back."""
        async with asyncio.timeout(PATIENCE):
            while not self.used:
                self._called.clear()
                self.collect()
                if not self.used:
                    await self._called.wait()
        return self.used.popleft()

    async def ask(self, out: bytes | list[bytes] = b"", room: int | list[int] = 0) -> bytes:
        """Makes a buffer available and returns what the device wrote into it. No other buffer is under way."""
        token = self.add(out, room)
        came, data = await self.next_used()
        assert came == token
        return data

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.call_fd)
        os.close(self.kick_fd)
        os.close(self.call_fd)


class Slot:
    """A device and the driver's side of it. ``async with Slot(device) as slot:`` starts all its queues."""

    def __init__(
        self,
        device: Device,
        features: int | None = None,
        queue_size: int = 64,
        spare: int = 0,
        queues: int | None = None,
    ) -> None:
        """`features`: those acknowledged, by default all but packed rings. `spare` bytes of memory belong to no queue
        and begin at address 0."""
        self.device = device
        self.features = device.features & ~DeviceFeature.RING_PACKED if features is None else features
        self.queue_size = queue_size
        self.first_part = spare
        self.queue_count = device.queue_count if queues is None else queues
        self.config_changes = 0
        self.failures: list[tuple[int, str]] = []
        """Queues that the device gave up, and why."""
        self.broken = ""
        size = spare + self.queue_count * PART
        self.memory_fd = os.memfd_create("slot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memory_fd, size)
        self.memory = GuestMemory().with_region(0, size, 0, 0, self.memory_fd)
        self.rings: list[Ring] = []
        device.transport = self

    def config_changed(self) -> bool:
        self.config_changes += 1
        return True

    def fail_queue(self, index: int, error: str) -> None:
        self.failures.append((index, error))

    def disconnect(self, reason: str) -> None:
        self.broken = reason

    def start(self, indices: list[int] | None = None) -> None:
        """Negotiates and starts the queues, all of them by default."""
        self.device.set_features(self.features)
        self.device.set_memory(self.memory)
        self.rings = self.rings or [
            Ring(self, index, self.features, self.queue_size) for index in range(self.queue_count)
        ]
        for ring in self.rings if indices is None else [self.rings[index] for index in indices]:
            self.device.start_queue(
                Vring(
                    ring.index,
                    ring.size,
                    descriptor_addr=ring.addresses[0],
                    driver_addr=ring.addresses[1],
                    device_addr=ring.addresses[2],
                    base=ring.base,
                    kick_fd=ring.kick_fd,
                    call_fd=ring.call_fd,
                    err_fd=None,
                )
            )
            self.device.enable_queue(ring.index, True)
        self.device.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)

    async def stop(self) -> None:
        """Stops the queues as a paused machine does; they can be started again."""
        for ring in self.rings:
            await self.device.drain_queue(ring.index)
            ring.base = self.device.stop_queue(ring.index)

    async def reset(self) -> None:
        """The driver resets the device, and starts anew."""
        await self.stop()
        self.device.reset()
        for ring in self.rings:
            ring.close()
        self.rings = []
        self.start()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
        self.device.disconnected("the end of the test")
        for ring in self.rings:
            ring.close()
        os.close(self.memory_fd)


async def until(condition: object, what: str = "what was waited for") -> None:
    """Waits until the function `condition` returns something true."""
    assert callable(condition)
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
