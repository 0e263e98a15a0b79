"""A network interface of the kernel as a port (Documentation/networking/tuntap.rst).

The interface is created unless it exists; one that we created goes away with the port. Frames cross with a virtio-net
header, so the kernel and the guests leave checksums and segmentation to each other.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from viaduct.switch.config import ConfigError, PortConfig, TapPort
from viaduct.switch.handover_format import PortData
from viaduct.switch.tap_interface import OFFLOADS, exists, explain, open_queue, set_offloads, set_up

from .port import Port, PortOwner
from .retry import Retry

if TYPE_CHECKING:
    from viaduct.vhost_user.handover import Fds


class Tap(Port):
    """A tap interface, with as many queue pairs as it is asked for."""

    config: TapPort

    @property
    def pairs(self) -> int:  # type: ignore[override]  # a constant elsewhere
        """Queue pairs."""
        return self.config.queues

    def __init__(self, owner: PortOwner, name: str, config: PortConfig) -> None:
        super().__init__(owner, name, config)
        self._queues: list[int] = []
        self._accepted: list[str] = []
        self._found = False
        """The interface was there before us: whoever made it will make it again, if he wants to."""
        self._retry = Retry(self._open_again)

    async def _start(self) -> None:
        self._found = exists(self.config.ifname)
        self._open()

    def _open(self) -> None:
        try:
            for _ in range(self.pairs):
                self._queues.append(open_queue(self.config.ifname, multiple=self.pairs > 1))
            self._accepted = self._offer_offloads(self._queues)
            set_up(self.config.ifname)
            self._attach()
        except OSError as error:
            raise ConfigError(
                explain(self.config.ifname, error, multiple=self.config.queues > 1), ("ifname",)
            ) from None

    def _open_again(self) -> None:
        if self._found and not exists(self.config.ifname):
            raise ConfigError(f"the interface {self.config.ifname!r} is not there", ("ifname",))
        self._close_queues()
        self._open()
        self.broken = None
        self.owner.report("link-up", f"interface {self.config.ifname} is back", self.name)

    def queue_failed(self, index: int, message: str) -> None:
        """The interface was deleted: it is opened again when it comes back."""
        if self.broken is None:
            super().queue_failed(index, message)
        self._retry.start()

    def _attach(self) -> None:
        for pair, queue in enumerate(self._queues):
            self.data_path.attach_tap(self.number, pair, queue, self._accepted)

    async def _stop(self) -> None:
        self._retry.stop()
        self._close_queues()

    def _close_queues(self) -> None:
        while self._queues:
            os.close(self._queues.pop())

    async def freeze(self) -> None:
        self._retry.stop()

    def thaw(self) -> None:
        if self.broken is not None:
            self._retry.start()

    def save(self, fds: Fds) -> PortData:
        taps = [fds.add(queue) for queue in self._queues]
        return PortData(
            name=self.name, broken=self.broken, taps=taps, accepted=self._accepted, interface_found=self._found
        )

    async def _adopt(self, data: PortData, fds: Fds) -> None:
        self._queues = [fds.need(queue) for queue in data.taps]
        self._accepted, self._found = data.accepted, data.interface_found
        if data.broken is None:
            self._attach()

    def _offer_offloads(self, queues: list[int]) -> list[str]:
        """What the kernel may send us unfinished; it takes all that it knows from us. USO came with Linux 6.2."""
        for accepted in ([*OFFLOADS], [name for name in OFFLOADS if name != "uso"]):
            try:
                for queue in queues:
                    set_offloads(queue, accepted)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return accepted
        return []

    def _next_try(self) -> float | None:
        return self._retry.next_try

    def _why_down(self) -> str:
        return f"interface {self.config.ifname} is not attached"
