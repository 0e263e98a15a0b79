"""A device model in this process: any `viaduct.vhost_user.Device`, driven directly."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

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

    @property
    def config(self) -> bytes:  # type: ignore[override]  # the device keeps it
        """The configuration space, as the device shows it now."""
        return self.device.read_config(0, self.device.config_size) if self.device.config_size else b""

    async def open(self, ram: Ram) -> None:
        self._ram = ram

    async def activate(self, features: int, queues: Sequence[Vring]) -> None:
        assert self._ram is not None
        device = self.device
        try:
            device.set_features(features)
            device.set_memory(self._ram.memory)
            for vring in queues:
                device.start_queue(vring)
                self._queues.append(vring.index)
                device.enable_queue(vring.index, True)
        except (VhostUserError, ValueError, OSError) as error:
            await self.deactivate()
            raise MachineError(str(error)) from error

    async def deactivate(self) -> Mapping[int, int]:
        bases = {}
        for index in self._queues:
            self.device.enable_queue(index, False)
            await self.device.drain_queue(index)
            bases[index] = self.device.stop_queue(index)
        self._queues.clear()
        return bases

    def reset(self) -> None:
        self.device.reset()

    def write_config(self, offset: int, data: bytes) -> None:
        try:
            self.device.write_config(offset, data, 0)
        except (NotImplementedError, VhostUserError, ValueError) as error:
            log.warning(
                "the driver's write of %s to configuration offset %d was ignored: %s", data.hex(), offset, error
            )

    def save(self) -> dict[str, Any]:
        fds = Fds()
        saved = self.device.save(fds)
        if fds.fds:
            raise MachineError(f"{type(self.device).__name__} holds descriptors that no file can keep")
        return saved

    def restore(self, data: dict[str, Any]) -> None:
        self.device.restore(data, Fds())

    async def close(self) -> None:
        # Not drained: the guest has ended, and a request that never finishes must not keep its machine.
        while self._queues:
            index = self._queues.pop()
            self.device.enable_queue(index, False)
            self.device.stop_queue(index)
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
