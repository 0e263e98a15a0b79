"""A virtio device in a machine: the transport that its driver sees, joined to the back-end that serves its queues.

# How it works

A driver's decisions arrive on a vCPU's thread, in the middle of the instruction that wrote a register. They are carried
out on the machine's asyncio loop, where back-ends live, and the vCPU waits for that, without the interpreter lock. The
loop never waits for a vCPU in return: stopping and pausing are awaited.

Only decisions come this way - a driver that starts, resets, writes configuration. Buffers do not: the back-end has the
queues' eventfds from the transport, and shared memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from viaduct.devices.seldom import Seldom
from viaduct.vhost_user.device import Vring
from viaduct.vhost_user.ring import PACKED_START
from viaduct.virtio.features import DeviceFeature
from viaduct.vmm.back_end import BackEnd
from viaduct.vmm.errors import MachineError

log = logging.getLogger("viaduct.vmm")

Result = TypeVar("Result")
_LOOK = 0.5
"""Seconds between two looks of a waiting vCPU whether its machine has ended."""
QueueSetup = tuple[int, int, int, int, int, int, int]
"""Index, size, descriptor, driver and device address, kick and call eventfd: as `viaduct._core` tells of a queue."""


class Transport(Protocol):
    """What the slot needs of `viaduct._core.VirtioMmio` and `VirtioPci`."""

    def config_changed(self, config: bytes) -> None: ...

    def running_queues(self) -> tuple[int, list[QueueSetup]]: ...

    def save(self) -> bytes: ...

    def restore(self, state: bytes) -> None: ...

    def needs_reset(self) -> None: ...


class VirtioSlot:
    """The device `name` of a machine, served by `back_end`. `loop` is the machine's; `report` is told, on the loop, of
    what somebody should know: a kind of event and a text."""

    def __init__(
        self, name: str, back_end: BackEnd, loop: asyncio.AbstractEventLoop, report: Callable[[str, str], None]
    ) -> None:
        self.name = name
        self.back_end = back_end
        self.transport: Transport | None = None
        """Set by whoever makes it; before the guest runs."""
        self.closing = False
        """The machine ends: no vCPU waits any longer."""
        self._loop = loop
        self._report = report
        self._features = 0
        self._queues: tuple[Vring, ...] = ()
        self._seldom = Seldom()
        back_end.on_config_change = self.show_config
        back_end.on_failure = self._failed

    # What the transport calls, on the threads of vCPUs.

    def activate(self, features: int, queues: Sequence[QueueSetup]) -> None:
        """The driver is ready. Raises `MachineError`, whose text becomes the transport's reason to need a reset."""
        start = PACKED_START if features & DeviceFeature.RING_PACKED else 0
        vrings = tuple(
            Vring(index, size, descriptor, driver, device, start, kick, call, None)
            for index, size, descriptor, driver, device, kick, call in queues
        )
        self._on_loop(self._activate(features, vrings))

    def reset(self) -> None:
        """The driver resets the device: when this returns, no queue is touched any more."""
        self._on_loop(self._reset())

    def write_config(self, offset: int, data: bytes) -> bytes:
        """The driver writes to the configuration space. Returns what it is now."""
        return self._on_loop(self._write_config(offset, data))

    def driver_error(self, text: str) -> None:
        """The driver broke a rule."""
        self._loop.call_soon_threadsafe(self._report, "driver-error", f"{self.name}: {text}")

    # What the machine calls, on the loop.

    async def suspend(self) -> dict[int, int]:
        """Stops the queues, for a snapshot; returns where they stand. Raises `MachineError`."""
        return dict(await self.back_end.deactivate())

    async def resume(self, features: int, queues: Sequence[QueueSetup], bases: Mapping[int, int]) -> None:
        """Starts queues where they stand. Raises `MachineError`."""
        if missing := [queue[0] for queue in queues if queue[0] not in bases]:
            raise MachineError(f"{self.name}: nobody knows where queues {missing} stand; the snapshot is damaged")
        vrings = tuple(
            Vring(index, size, descriptor, driver, device, bases[index], kick, call, None)
            for index, size, descriptor, driver, device, kick, call in queues
        )
        await self._activate(features, vrings)

    async def resume_suspended(self, bases: Mapping[int, int]) -> None:
        """Undoes `suspend`; a device that does not come back needs a reset by its driver."""
        if self._queues:
            vrings = [_with_base(vring, bases.get(vring.index, vring.base)) for vring in self._queues]
            try:
                await self.back_end.activate(self._features, vrings)
            except MachineError as error:
                self._failed(f"it did not go on after a snapshot: {error}")

    async def close(self) -> None:
        """Lets go of the back-end and of the transport."""
        self.transport = None
        await self.back_end.close()

    async def _activate(self, features: int, vrings: tuple[Vring, ...]) -> None:
        try:
            await self.back_end.activate(features, vrings)
        except MachineError as error:
            self._say_failure(str(error))
            raise
        self._features, self._queues = features, vrings

    async def _reset(self) -> None:
        self._queues = ()
        try:
            await self.back_end.deactivate()
        except MachineError as error:
            self._say_failure(str(error))
        try:
            self.back_end.reset()
        except MachineError as error:
            self._say_failure(str(error))
        self.show_config()

    async def _write_config(self, offset: int, data: bytes) -> bytes:
        self.back_end.write_config(offset, data)
        return self.back_end.config

    def show_config(self) -> None:
        """Lets the driver read the configuration space as it is now: the transport keeps a copy."""
        if self.transport is not None:
            self.transport.config_changed(self.back_end.config)

    def _failed(self, reason: str) -> None:
        if not self._queues:
            return  # The driver has reset the device meanwhile.
        self._say_failure(reason)
        if self.transport is not None:
            self.transport.needs_reset()

    def _say_failure(self, reason: str) -> None:
        """A driver may reset its device and break it again as often as it likes."""
        if text := self._seldom.text("failure", f"{self.name}: {reason}"):
            self._report("device-failed", text)

    def _on_loop(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # The machine has ended.
            work.close()
            raise MachineError("the machine has ended") from None
        while True:
            try:
                return future.result(_LOOK)
            except TimeoutError:
                if future.done():
                    raise
                if self.closing or not self._loop.is_running():
                    # Nobody will do it any more, and whoever ends the machine waits for this vCPU.
                    future.cancel()
                    raise MachineError("the machine has ended") from None


def _with_base(vring: Vring, base: int) -> Vring:
    return Vring(
        vring.index,
        vring.size,
        vring.descriptor_addr,
        vring.driver_addr,
        vring.device_addr,
        base,
        vring.kick_fd,
        vring.call_fd,
        vring.err_fd,
    )
