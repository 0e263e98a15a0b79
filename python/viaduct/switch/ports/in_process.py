"""A virtual machine's network card whose machine runs in this process: the same device, without a socket."""

from __future__ import annotations

from viaduct.switch.config import InProcessPort
from viaduct.virtio.features import DeviceType, describe_features

from .net_device import NetDevice
from .port import Port, PortOwner


class InProcess(Port):
    """A port whose `device` the machine drives itself, on the switch's asyncio loop."""

    config: InProcessPort

    def __init__(self, owner: PortOwner, name: str, config: InProcessPort) -> None:
        super().__init__(owner, name, config)
        self.device = NetDevice(self)

    @property
    def pairs(self) -> int:  # type: ignore[override]  # a constant elsewhere
        """Queue pairs offered."""
        return self.config.queues

    @property
    def own_mtu(self) -> int | None:
        """The configured MTU."""
        return self.config.mtu

    @property
    def mtu(self) -> int | None:  # type: ignore[override]  # a constant elsewhere
        """The same: nobody else tells one."""
        return self.config.mtu

    def report(self, kind: str, message: str) -> None:
        """Add an event of this port to the switch's history."""
        self.owner.report(kind, message, self.name)

    def link_changed(self) -> None:
        """Report that frames can pass now, or no longer."""
        up = self.device.is_up
        self.report("link-up" if up else "link-down", self.device.describe() if up else self._why_down())

    def _ring(self) -> str | None:
        return self.device.layout if self.device.is_up else None

    def _features(self) -> tuple[str, ...]:
        if not self.device.is_up:
            return ()
        return tuple(describe_features(self.device.negotiated, DeviceType.NET).split(", "))

    def _why_down(self) -> str:
        return "the guest's driver has not started its queues"
