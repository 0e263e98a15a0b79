"""`path=emulated`: a card of registers in the machine's PCI bus, and its cable.

The cable ends in an interface of the kernel, or in a vhost-user back-end, for example a port of a switch: then the card
is a guest's driver to it, and the link comes up again by itself when the back-end was gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from viaduct._core import E1000
from viaduct.guest.errors import GuestError
from viaduct.guest.link import Link, LinkOptions
from viaduct.switch.tap_interface import explain, open_queue, set_up
from viaduct.vhost_user.errors import VhostUserError
from viaduct.vmm.errors import MachineError

if TYPE_CHECKING:
    from viaduct._core import GuestMemory

PATIENCE = 30.0
"""Seconds for a back-end to appear and to answer: it may run on the same busy host."""
_OPTIONS = LinkOptions(checksum=False, segmentation=False)
"""What leaves a card is complete, and so is what it takes."""


class EmulatedNic:
    """A card with the address `mac`, nothing plugged in. `function` goes into a slot. `report` is told, on the running
    loop, of what somebody should know: a kind of event and a text."""

    def __init__(self, name: str, mac: bytes, memory: GuestMemory, report: Callable[[str, str], None]) -> None:
        self.function = E1000(name, mac, memory)
        self._link: Link | None = None
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.function.complaint_fd, self._complained)

    def _complained(self) -> None:
        if (text := self.function.take_complaint()) is not None:
            self._report("device-error", f"{self.function.name}: {text}")

    def plug_into_tap(self, ifname: str) -> None:
        """Joins the card to an interface, which is made unless it exists. Raises `MachineError`."""
        try:
            tap = open_queue(ifname, header=None)
            try:
                set_up(ifname)
                self.function.attach_tap(tap)
            finally:
                os.close(tap)
        except OSError as error:
            raise MachineError(f"tap {ifname}: {explain(ifname, error)}") from error

    async def plug_into_back_end(self, path: str, within: float = PATIENCE) -> None:
        """Joins the card to who listens on a vhost-user socket, in so many seconds. Raises `MachineError`."""
        try:
            self._link = Link(path, _OPTIONS, self.function.name, self.function)
            await self._link.start(within)
        except (GuestError, VhostUserError) as error:
            raise MachineError(f"{self.function.name}: {error}") from error

    async def close(self) -> None:
        """Pulls the cable out."""
        self._loop.remove_reader(self.function.complaint_fd)
        link, self._link = self._link, None
        if link is not None:
            await link.close()
        self.function.detach()
