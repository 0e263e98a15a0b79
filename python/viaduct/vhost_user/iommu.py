"""The IOMMU in front of one connection's device (vhost-user, "IOMMU support").

The table itself is `viaduct._core.Iotlb`, which pollers look into. They put down what they miss and signal an eventfd;
here the misses become messages to the front-end. It answers each with an update over the main channel, or with a
refusal on the channel the miss went by; one that does neither within `PATIENCE` has refused. What is still waited for
is bounded in the table, so a guest that names addresses at random costs itself its own frames and nobody else anything.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from viaduct.vhost_user import payloads as p
from viaduct.vhost_user.back_channel import BackChannel
from viaduct.vhost_user.errors import RequestError
from viaduct.vhost_user.event_fd import drain

if TYPE_CHECKING:
    from viaduct import _core
    from viaduct.vhost_user.device import Device
    from viaduct.vhost_user.memory_table import MemoryTable

PATIENCE = 1.0
"""Seconds a front-end has to answer a miss."""
RETRY = 1.0
"""Seconds after a refusal until who still waits asks again: a ring's page may be mapped by now, and nobody says so."""
REPORT_INTERVAL = 1.0
"""Seconds between two reports of forbidden accesses: a guest may provoke any number, and QEMU logs each."""

PAGE = 4096
READ, WRITE = 1, 2
"""VHOST_ACCESS_RO and VHOST_ACCESS_WO."""
MISS, UPDATE, INVALIDATE, ACCESS_FAIL = 1, 2, 3, 4
"""Types of IOTLB messages (vhost-user, "IOTLB message")."""
_SECTION = 'vhost-user, "IOTLB message"'


class Iommu:
    """Takes over what the front-end says and asks for what is missing.

    `channel` gives the back-end channel, if there is one by now; `acknowledged`: misses may be sent with need_reply;
    `answered` is called when queues that wait should look again.
    """

    def __init__(
        self,
        device: Device,
        channel: Callable[[], BackChannel | None],
        acknowledged: Callable[[], bool],
        answered: Callable[[], None],
    ) -> None:
        from viaduct._core import Iotlb

        self._device = device
        self._channel = channel
        self._acknowledged = acknowledged
        self._answered = answered
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.table: _core.Iotlb = Iotlb(self._event_fd)
        self._loop = asyncio.get_running_loop()
        self._deadlines: dict[tuple[int, bool], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._next_report = 0.0
        self._loop.add_reader(self._event_fd, self._work)

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Ranges known now; updates, invalidations, misses and refused misses since the features were negotiated."""
        return self.table.counts

    def message(self, payload: p.Iotlb, memory: MemoryTable) -> None:
        """Carries out IOTLB_MSG. When it returns, nobody uses what was invalidated. Raises `RequestError`."""
        if payload.type == INVALIDATE:
            self._device.translations_removed(*self.table.invalidate(payload.iova, payload.size))
            return
        if payload.type != UPDATE:
            raise RequestError(f"type {payload.type}", f"{UPDATE} (update) and {INVALIDATE} (invalidate)", _SECTION)
        if not memory.holds_user_range(payload.user_addr, 1):
            raise RequestError(f"user address {payload.user_addr:#x}", "those of the memory table's regions", _SECTION)
        try:
            stale = self.table.update(payload.iova, payload.size, payload.user_addr, payload.permissions)
        except ValueError as error:
            raise RequestError(str(error), "what the document names", _SECTION) from None
        if stale is not None:
            self._device.translations_removed(*stale)
        self._tell()

    def forget(self) -> None:
        """Nothing that the front-end has said holds any more."""
        self._device.translations_removed(*self.table.invalidate(0, 0))

    def _tell(self) -> None:
        self._answered()
        self.table.forget_refusals()

    def pause(self) -> None:
        """Asks for nothing and gives nothing up, until `go_on`."""
        self._loop.remove_reader(self._event_fd)
        for timer in (self._timer, self._retry):
            if timer is not None:
                timer.cancel()
        self._timer = self._retry = None

    def go_on(self) -> None:
        """Ends what `pause` began."""
        self._loop.add_reader(self._event_fd, self._work)
        self._expire()
        self._ask_again_later()

    def close(self) -> None:
        """Asks for nothing more."""
        self.pause()
        os.close(self._event_fd)

    def _work(self) -> None:
        drain(self._event_fd)
        channel = self._channel()
        deadline = self._loop.time() + PATIENCE
        for miss in self.table.take_misses():
            # To the end: deadlines stay in order.
            self._deadlines.pop(miss, None)
            self._deadlines[miss] = deadline
            if channel is not None:
                iova, write = miss
                payload = p.Iotlb(iova, PAGE, 0, WRITE if write else READ, MISS)
                answered = partial(self._told, miss, deadline) if self._acknowledged() else None
                channel.post("BACKEND_IOTLB_MSG", payload, answered)
        if self._deadlines and self._timer is None:
            self._timer = self._loop.call_at(deadline, self._expire)
        self._report(channel)

    def _told(self, miss: tuple[int, bool], deadline: float, granted: bool) -> None:
        """The front-end has acknowledged a miss. If it has granted it, the update has come already or is under way."""
        if not granted and self._deadlines.get(miss) == deadline:
            del self._deadlines[miss]
            self._refuse(miss)

    def _expire(self) -> None:
        """Gives up what was not answered in time, and comes back for the rest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        while self._deadlines:
            miss, deadline = next(iter(self._deadlines.items()))
            if deadline > now:
                self._timer = self._loop.call_at(deadline, self._expire)
                return
            del self._deadlines[miss]
            self._refuse(miss)

    def _refuse(self, miss: tuple[int, bool]) -> None:
        if self.table.refuse(*miss):
            self._tell()
            self._ask_again_later()

    def _ask_again_later(self) -> None:
        """Chains whose page is refused are given up, but a ring goes on waiting for its pages."""
        if self._retry is None:
            self._retry = self._loop.call_later(RETRY, self._ask_again)

    def _ask_again(self) -> None:
        self._retry = None
        self._answered()

    def _report(self, channel: BackChannel | None) -> None:
        forbidden = self.table.take_forbidden()
        if forbidden and channel is not None and self._loop.time() >= self._next_report:
            self._next_report = self._loop.time() + REPORT_INTERVAL
            iova, write = forbidden[0]
            payload = p.Iotlb(iova, PAGE, 0, WRITE if write else READ, ACCESS_FAIL)
            channel.post("BACKEND_IOTLB_MSG", payload)
