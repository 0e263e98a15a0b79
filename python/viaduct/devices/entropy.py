"""An entropy device (virtio 1.2, 5.4): fills the driver's buffers with random bytes of this host.

The system's generator (getrandom(2)) never runs dry, so the only thing to limit is how much of this process's time a
guest may take. A buffer may claim gigabytes; it gets at most `CHUNK` bytes, which is what the driver is told (virtio
1.2, 5.4.6.1: at least one byte). With a rate, bytes are saved up for a tenth of a second; a driver that wants more
waits, and its buffers stay in its ring meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from viaduct.vhost_user.device import Vring
from viaduct.vhost_user.queue_device import QueueDevice
from viaduct.virtio.features import DeviceType

REQUESTS = 0
"""The device's only queue (virtio 1.2, 5.4.2)."""
CHUNK = 64 << 10
"""Most bytes for one buffer."""
SAVINGS = 0.1
"""Seconds of its rate that an idle guest has saved up at most."""


class Entropy(QueueDevice):
    """An entropy device. `rate`: most bytes a second; None: as many as the guest asks for.

    Raises ValueError for a rate below 1.
    """

    device_id = DeviceType.ENTROPY
    pulled_queues = frozenset({REQUESTS})

    def __init__(self, rate: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        if rate is not None and rate < 1:
            raise ValueError(f"rate {rate}: 1 byte a second or more; leave it away for no limit")
        self.rate = rate
        self.given = 0
        """Random bytes given so far."""
        self._clock = clock
        self._saved = self._most = max(1.0, (rate or 0) * SAVINGS)
        self._counted = clock()
        self._later: asyncio.TimerHandle | None = None

    def chains_waiting(self, queue: int) -> None:
        self._forget_timer()
        while allowed := self._allowed():
            if (chain := self.take(REQUESTS)) is None:
                return
            data = os.urandom(min(chain.writable_len, allowed))
            chain.write(data)
            self.give(REQUESTS, chain)
            self.given += len(data)
            self._saved -= len(data)
        # At least one byte and at most what can be saved: the driver's buffers are worth filling.
        wanted = self._most - self._saved
        assert self.rate is not None
        self._later = asyncio.get_running_loop().call_later(wanted / self.rate, self.chains_waiting, REQUESTS)

    def _allowed(self) -> int:
        """How many bytes may be given now."""
        if self.rate is None:
            return CHUNK
        now = self._clock()
        self._saved = min(self._most, self._saved + (now - self._counted) * self.rate)
        self._counted = now
        return min(CHUNK, int(self._saved))

    def _forget_timer(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def start_queue(self, vring: Vring) -> None:
        self._forget_timer()
        super().start_queue(vring)

    def stop_queue(self, index: int) -> int:
        self._forget_timer()
        return super().stop_queue(index)
