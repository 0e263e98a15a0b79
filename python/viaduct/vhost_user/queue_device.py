"""Devices that answer requests in Python.

# How it works

A `QueueDevice` runs one `viaduct._core.DeviceQueue` for each started queue. The driver's kick wakes the loop, which
takes the chains that are available, gives each to `handle` and puts it back; then the driver is notified once if it
wants to be, and asked for the next kick before the loop sleeps. After asking, it looks once more, because a chain that
came in between brings no kick (virtio 1.2, 2.7.13.3.1 and 2.8.21.3.1).

`handle` may be ``async def``: then requests run side by side and are completed as they finish, in any order. Before a
queue stops, no more requests are taken and those in flight finish, so that GET_VRING_BASE tells the truth. If this
process dies with requests in flight, and the front-end tracks them (INFLIGHT_SHMFD), the next one is asked again.

Some queues carry no requests: their chains are room for what the device will have to say, or come faster than the
device wants to listen. Name those in `pulled_queues`: then `chains_waiting` is called when there may be chains, and the
device takes one with `take` when it has a use for it, fills it or reads it, and gives it back at once with `give`. A
chain that is not taken stays with the driver, so nothing is in flight when the queue stops.

A queue that is started but disabled waits. A driver that breaks its ring, and a `handle` that raises, stop the queue:
the front-end is told through the error descriptor, and the log says what happened (see `Backend.fail_queue`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from viaduct._core import DeviceQueue, RingError
from viaduct.vhost_user.device import Device, Vring
from viaduct.vhost_user.event_fd import drain, signal
from viaduct.vhost_user.inflight import InflightDevice
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.virtio.features import DeviceFeature

if TYPE_CHECKING:
    from viaduct import _core

log = logging.getLogger("viaduct.vhost_user")

BATCH = 64
"""Chains answered before the loop gets its turn: other ports share it."""
POLL_INTERVAL = 0.001
"""Seconds between looks at a queue whose driver does not notify (SET_VRING_KICK without descriptor)."""


class QueueDevice(InflightDevice):
    """Base of devices written in Python: set `device_id` (and `queue_count`, `features`) and define `handle`."""

    features: int = int(
        DeviceFeature.VERSION_1 | DeviceFeature.RING_PACKED | DeviceFeature.INDIRECT_DESC | DeviceFeature.EVENT_IDX
    )
    protocol_features: ProtocolFeature = Device.protocol_features | ProtocolFeature.INFLIGHT_SHMFD
    pulled_queues: frozenset[int] = frozenset()
    """Queues whose chains do not go to `handle`: the device takes them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: _core.GuestMemory | None = None
        """The guest's memory, while a front-end is connected."""
        self._queues: dict[int, _RunningQueue] = {}

    def handle(self, queue: int, chain: _core.Chain) -> Awaitable[None] | None:
        """Answers one request of queue number `queue`: reads what the driver gives with ``chain.read()`` and appends
        to the room it gives with ``chain.write(data)``. The chain goes back to the driver when this returns or, if it
        is ``async def``, when it finishes."""
        raise NotImplementedError

    def chains_waiting(self, queue: int) -> None:
        """There may be chains in one of `pulled_queues`: it was enabled, or the driver kicked after `take` had found
        none, or a batch is over and others have had their turn."""

    def take(self, queue: int) -> _core.Chain | None:
        """The next chain of a queue, to be given back with `give`. None: there is none now, or the queue does not run,
        or the device has had its share of this turn of the loop; `chains_waiting` is called when that changes."""
        running = self._queues.get(queue)
        return running.take() if running is not None else None

    def give(self, queue: int, chain: _core.Chain) -> None:
        """Gives back a chain that came from `take`, with what was written into it; nothing happens if the queue has
        been stopped since."""
        if (running := self._queues.get(queue)) is not None:
            running.give(chain)

    def set_features(self, features: int) -> None:
        self.negotiated = features

    def set_memory(self, memory: _core.GuestMemory) -> None:
        for queue in self._queues.values():
            queue.core.set_memory(memory)
        self.memory = memory

    def start_queue(self, vring: Vring) -> None:
        assert self.memory is not None
        core = DeviceQueue(
            self.memory,
            layout="packed" if self.packed else "split",
            size=vring.size,
            descriptor_addr=vring.descriptor_addr,
            driver_addr=vring.driver_addr,
            device_addr=vring.device_addr,
            base=vring.base,
            event_idx=bool(self.negotiated & DeviceFeature.EVENT_IDX),
            indirect=bool(self.negotiated & DeviceFeature.INDIRECT_DESC),
            in_order=bool(self.negotiated & DeviceFeature.IN_ORDER),
        )
        core.set_log_addr(vring.log_addr)
        if region := self.inflight_region(vring.index):
            # What an earlier process took and did not give back comes first.
            core.attach_inflight(*region)
        self._queues[vring.index] = _RunningQueue(self, vring, core)

    def enable_queue(self, index: int, enabled: bool) -> None:
        if enabled:
            self._queues[index].resume()
        else:
            self._queues[index].pause()

    async def drain_queue(self, index: int) -> None:
        if queue := self._queues.get(index):
            await queue.finish()

    def stop_queue(self, index: int) -> int:
        queue = self._queues.pop(index)
        queue.pause()
        queue.cancel()
        return queue.core.base

    def set_call(self, index: int, fd: int | None) -> None:
        self._queues[index].call_fd = fd

    def set_log_addr(self, index: int, addr: int | None) -> None:
        self._queues[index].core.set_log_addr(addr)

    def disconnected(self, reason: str) -> None:
        self.memory = None
        self.forget_inflight()


class _RunningQueue:
    """One started queue."""

    def __init__(self, device: QueueDevice, vring: Vring, core: _core.DeviceQueue) -> None:
        self.device = device
        self.index = vring.index
        self.kick_fd = vring.kick_fd
        self.call_fd = vring.call_fd
        self.core = core
        self._loop = asyncio.get_running_loop()
        self._active = False
        self._failed = False
        self._next_look: asyncio.Handle | None = None
        self._pulled = vring.index in device.pulled_queues
        self._taken = 0
        """Chains taken by a device that pulls, since others had their turn."""
        self._unpublished: asyncio.Handle | None = None
        self._in_flight: set[asyncio.Task[None]] = set()

    def resume(self) -> None:
        """Begins to take chains; some may have been waiting."""
        if self._active or self._failed:
            return
        self._active = True
        if self.kick_fd is not None:
            self._loop.add_reader(self.kick_fd, self._kicked)
        self._look_soon()

    def pause(self) -> None:
        """Takes no more chains."""
        if self._active and self.kick_fd is not None:
            self._loop.remove_reader(self.kick_fd)
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        if self._unpublished is not None:
            self._unpublished.cancel()
            self._publish_given()
        self._active = False

    def take(self) -> _core.Chain | None:
        """The next chain for a device that pulls; see `QueueDevice.take`."""
        if not self._active:
            return None
        if self._taken >= BATCH:
            self._look_soon()
            return None
        try:
            self._check_memory()
            chain = self.core.pop()
            if chain is None and self.kick_fd is not None and self.core.enable_notifications():
                chain = self.core.pop()
        except RingError as error:
            self._fail(error)
            return None
        if chain is not None:
            self._taken += 1
        return chain

    def give(self, chain: _core.Chain) -> None:
        """Gives a chain back; the driver is told once for all of this turn of the loop."""
        self.core.push(chain)
        if self._unpublished is None:
            self._unpublished = self._loop.call_soon(self._publish_given)

    def _publish_given(self) -> None:
        self._unpublished = None
        self._publish()

    async def finish(self) -> None:
        """Takes no more chains and waits until those in flight are completed."""
        self.pause()
        while self._in_flight:
            await asyncio.wait(self._in_flight)

    def cancel(self) -> None:
        """Drops what is in flight: the front-end has gone, and the queue must not be touched any more."""
        self._failed = True
        for task in self._in_flight:
            task.cancel()

    def _kicked(self) -> None:
        assert self.kick_fd is not None
        if not drain(self.kick_fd):
            self._loop.remove_reader(self.kick_fd)  # It stays readable for ever.
        self._look()

    def _look_soon(self) -> None:
        if self._next_look is None:
            self._next_look = self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Answers up to a batch of chains and decides when to look again."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        try:
            more = self._answer()
            self._check_memory()
        except Exception as error:
            self._fail(error)
            return
        if more:
            self._look_soon()
        elif self.kick_fd is None:
            self._next_look = self._loop.call_later(POLL_INTERVAL, self._look)

    def _check_memory(self) -> None:
        memory = self.device.memory
        if memory is not None and memory.faulted:
            raise RingError("the file behind the guest's memory was truncated under it")

    def _answer(self) -> bool:
        """Whether there is more to do at once."""
        if self._pulled:
            self._taken = 0
            self.core.disable_notifications()
            self.device.chains_waiting(self.index)
            return False
        completed = False
        try:
            for _ in range(BATCH):
                chain = self.core.pop()
                if chain is None:
                    break
                pending = self.device.handle(self.index, chain)
                if inspect.isawaitable(pending):
                    task = asyncio.ensure_future(self._complete_later(pending, chain))
                    self._in_flight.add(task)
                    task.add_done_callback(self._in_flight.discard)
                else:
                    self.core.push(chain)
                    completed = True
            else:
                return True
        finally:
            if completed:
                self._publish()
        return self.kick_fd is not None and self.core.enable_notifications()

    async def _complete_later(self, pending: Awaitable[None], chain: _core.Chain) -> None:
        try:
            await pending
            if not self._failed:
                self.core.push(chain)
                self._publish()
        except Exception as error:
            if not self._failed:
                self._fail(error)

    def _publish(self) -> None:
        if self.core.publish():
            signal(self.call_fd)

    def _fail(self, error: Exception) -> None:
        """The driver broke the ring, or the device could not answer: the queue goes no further."""
        self.pause()
        self._failed = True
        transport, memory = self.device.transport, self.device.memory
        if transport is None:
            return
        if memory is not None and memory.faulted:
            transport.disconnect(str(error))
        elif isinstance(error, RingError):
            transport.fail_queue(self.index, str(error))
        else:
            log.error("the device failed to answer a request", exc_info=error)
            transport.fail_queue(self.index, f"the device failed: {type(error).__name__}: {error}")
