"""What a machine asks of whoever serves a device's queues."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from viaduct.vhost_user.device import Vring
from viaduct.vmm.ram import Ram


class BackEnd(ABC):
    """One device's. All methods are called on the machine's asyncio loop, one at a time."""

    device_id: int
    """Virtio device number (`viaduct.virtio.DeviceType`)."""
    features: int
    """Feature bits that the driver may choose from; known once it is open."""
    queue_sizes: Sequence[int]
    """Most descriptors of each queue; known once it is open."""
    config: bytes
    """The configuration space; known once it is open."""
    disabled: frozenset[int] = frozenset()
    """Queues that run and are not to be served now: a driver of several queue pairs may use fewer."""
    on_config_change: Callable[[], None] | None = None
    """Called when `config` has changed."""
    on_failure: Callable[[str], None] | None = None
    """Called with the reason when the device cannot go on until its driver resets it."""

    @abstractmethod
    async def open(self, ram: Ram) -> None:
        """Reaches the device, and learns what it offers. Raises `MachineError`."""

    @abstractmethod
    async def activate(self, features: int, queues: Sequence[Vring]) -> None:
        """Serves these queues, the driver having taken `features`, until `deactivate`. Raises `MachineError`."""

    @abstractmethod
    async def deactivate(self) -> Mapping[int, int]:
        """Serves no queue any more: requests in flight have finished. Returns where each queue stands, as in
        `viaduct.vhost_user.Vring.base`. Raises `MachineError` if that is not known, the queues being left alone all
        the same."""

    async def disable(self, queues: frozenset[int]) -> None:
        """From now on these queues are not served, all others are. Raises `MachineError`: some are as before."""
        self.disabled = queues

    @abstractmethod
    def reset(self) -> None:
        """The driver has reset the device; its queues have been deactivated."""

    @abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """A driver's write to the configuration space; what it may not write is ignored."""

    def save(self) -> dict[str, Any]:
        """What the device knows besides its rings, for a snapshot: plain data. The queues are stopped."""
        return {}

    def restore(self, data: dict[str, Any]) -> None:
        """Takes over what was saved, before the queues start. Raises ValueError for what cannot be."""
        if data:
            raise ValueError(f"nothing was to be saved, and there is {', '.join(data)}")

    @abstractmethod
    async def close(self) -> None:
        """Lets go of the device. May be called twice."""
