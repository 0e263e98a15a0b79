"""A device model in this process: any `viaduct.vhost_user.Device`, driven directly.

It may be the user's own, with mistakes in it: an exception of any kind becomes a `MachineError` that says whose it is,
and where it was raised goes to the log. The machine goes on, and the driver is told that the device needs a reset.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from viaduct.devices.seldom import Seldom
from viaduct.vhost_user.device import Device, Vring
from viaduct.vhost_user.errors import VhostUserError
from viaduct.vhost_user.handover import Fds
from viaduct.virtio.features import DeviceFeature
from viaduct.vmm.back_end.back_end import BackEnd
from viaduct.vmm.errors import MachineError
from viaduct.vmm.ram import Ram

log = logging.getLogger("viaduct.vmm")

_NOT_FOR_DRIVERS = DeviceFeature.PROTOCOL_FEATURES | DeviceFeature.LOG_ALL | DeviceFeature.ACCESS_PLATFORM
"""What the protocol and migration use, and an IOMMU, which machines of ours do not have."""


class InProcessBackEnd(BackEnd):
    """Drives `device` as a vhost-user back-end would, without a socket between."""

    def __init__(self, device: Device) -> None:
        self.device = device
        device.transport = self
        self.device_id = device.device_id
        self.features = device.features & ~int(_NOT_FOR_DRIVERS)
        self.queue_sizes = (device.queue_size,) * device.queue_count
        self._ram: Ram | None = None
        self._queues: list[int] = []
        self._seldom = Seldom()
        self._config = b""

    @property
    def config(self) -> bytes:  # type: ignore[override]  # the device keeps it
        """The configuration space, as the device shows it now; if it cannot, as it was."""
        with contextlib.suppress(MachineError), self._blaming("read_config"):
            if self.device.config_size:
                self._config = bytes(self.device.read_config(0, self.device.config_size))
        return self._config

    @contextlib.contextmanager
    def _blaming(self, method: str) -> Iterator[None]:
        """What the device raises inside becomes `MachineError`."""
        try:
            yield
        except MachineError:
            raise
        except (NotImplementedError, VhostUserError, ValueError, OSError) as error:
            raise MachineError(str(error)) from error
        except Exception as error:
            text = f"{type(self.device).__name__}.{method} failed: {type(error).__name__}: {error}"
            if said := self._seldom.text(method, text):
                log.error("%s", said, exc_info=error)
            raise MachineError(text) from error

    async def open(self, ram: Ram) -> None:
        self._ram = ram

    async def activate(self, features: int, queues: Sequence[Vring]) -> None:
        assert self._ram is not None
        device = self.device
        try:
            with self._blaming("set_features"):
                device.set_features(features)
            with self._blaming("set_memory"):
                device.set_memory(self._ram.memory)
            for vring in queues:
                with self._blaming("start_queue"):
                    device.start_queue(vring)
                    self._queues.append(vring.index)
                    device.enable_queue(vring.index, vring.index not in self.disabled)
        except MachineError:
            with contextlib.suppress(MachineError):
                await self.deactivate()
            raise

    async def disable(self, queues: frozenset[int]) -> None:
        before, self.disabled = self.disabled, queues
        for index in self._queues:
            if (index in before) != (index in queues):
                with self._blaming("enable_queue"):
                    self.device.enable_queue(index, index not in queues)

    async def deactivate(self) -> Mapping[int, int]:
        bases: dict[int, int] = {}
        problem: MachineError | None = None
        while self._queues:
            index = self._queues.pop(0)
            try:
                with self._blaming("stop_queue"):
                    self.device.enable_queue(index, False)
                    await self.device.drain_queue(index)
                    bases[index] = self.device.stop_queue(index)
            except MachineError as error:
                problem = problem or error
        if problem is not None:
            raise problem
        return bases

    def reset(self) -> None:
        with self._blaming("reset"):
            self.device.reset()

    def write_config(self, offset: int, data: bytes) -> None:
        who = type(self.device).__name__
        try:
            with self._blaming("write_config"):
                self.device.write_config(offset, data, 0)
        except MachineError as error:
            text = f"{who}: the driver's write of {data.hex()} to configuration offset {offset} was ignored: {error}"
            if said := self._seldom.text("config", text):
                log.warning("%s", said)

    def save(self) -> dict[str, Any]:
        fds = Fds()
        with self._blaming("save"):
            saved = self.device.save(fds)
        if fds.fds:
            raise MachineError(f"{type(self.device).__name__} holds descriptors that no file can keep")
        return saved

    def restore(self, data: dict[str, Any]) -> None:
        with self._blaming("restore"):
            self.device.restore(data, Fds())

    async def close(self) -> None:
        # Not drained: the guest has ended, and a request that never finishes must not keep its machine.
        while self._queues:
            index = self._queues.pop()
            with contextlib.suppress(MachineError), self._blaming("stop_queue"):
                self.device.enable_queue(index, False)
                self.device.stop_queue(index)
        with contextlib.suppress(MachineError), self._blaming("disconnected"):
            self.device.disconnected("the machine has ended")

    # What the device tells its driver (`viaduct.vhost_user.device.Transport`).

    def config_changed(self) -> bool:
        """The configuration space has changed; returns whether there is somebody to tell."""
        if self.on_config_change is None:
            return False
        self.on_config_change()
        return True

    def fail_queue(self, index: int, error: str) -> None:
        """The running queue `index` cannot go on."""
        if self.on_failure is not None:
            self.on_failure(f"queue {index}: {error}")

    def disconnect(self, reason: str) -> None:
        """The memory cannot be used any more."""
        if self.on_failure is not None:
            self.on_failure(reason)
