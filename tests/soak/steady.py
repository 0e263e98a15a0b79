"""A pair of guests whose traffic the rest of a test must not disturb: every frame is numbered, checked and counted.

Sender and receiver are those of `viaduct.guest`, in this process: threads of their own carry the frames, and the queues
are long enough that neither loses one because this machine is doing something else. What is lost is the switch's doing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from interop.peer_process import PATIENCE, wait_until

from viaduct.guest import Received, Receiver, Sender

QUEUE = 16384
"""Descriptors: at the rates of the short forms more than three seconds of traffic."""
FOREVER = 1e6
_Result = TypeVar("_Result")


class SteadyPair:
    """Numbered traffic from `sender_socket` to `receiver_socket`, at `rate` frames a second, while the block runs.

    `number` tells the addresses of several pairs apart. `to`: send to this address, behind which somebody passes the
    frames on. `link` goes to `viaduct.guest.LinkOptions`.
    """

    def __init__(
        self, sender_socket: Path, receiver_socket: Path, rate: int, number: int = 0, to: str = "", **link: Any
    ) -> None:
        options = {"queue_size": QUEUE, **link}
        sends, receives = (f"02:76:64:0{role}:{number:02x}:01" for role in range(2))
        self.sender = Sender(
            sender_socket, rate=rate, mac=sends, dst=to or receives, connect_timeout=PATIENCE, **options
        )
        self.receiver = Receiver(receiver_socket, mac=receives, connect_timeout=PATIENCE, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="steady", daemon=True)
        self._sending: Any = None

    def _run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(2 * PATIENCE)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._run(self.receiver.start())
            self._sending = asyncio.run_coroutine_threadsafe(self.sender.run(seconds=FOREVER), self._loop)
            wait_until(lambda: self.report().received, "the steady pair's first frame")
        except BaseException:
            self._end()
            raise
        return self

    def report(self) -> Received:
        """What has arrived so far. Its longest latency is the longest time for which no frame passed."""
        return self._run(self._report())

    async def _report(self) -> Received:
        return self.receiver.report()

    def reconnects(self) -> int:
        """How often either end has lost the switch."""
        return self.sender.link.reconnects + self.receiver.link.reconnects

    def held_buffers(self) -> list[int]:
        """How many buffers of the sender's queues and of the receiver's receive queue are the device's. Without a
        device, that comes to be all of them: the drivers put in what they have, and get none back."""
        return [*self.sender.link.held_buffers(), self.receiver.link.held_buffers()[0]]

    def settle(self) -> Received:
        """Waits until all that was sent before now has arrived or is known to be lost, and says what has."""
        before = self.report()
        # Frames are numbered: one that is missing shows as soon as later ones are there.
        enough = before.received + QUEUE
        wait_until(lambda: self.report().received >= enough, "later frames of the steady pair")
        return self.report()

    def check(self) -> Received:
        """`settle`, and every frame arrived once, in order and unchanged, over the same connections."""
        report = self.settle()
        wrong = {name: getattr(report, name) for name in ("lost", "duplicated", "reordered", "corrupted")}
        assert not any(wrong.values()), f"of {report.received} frames: {wrong}"
        assert self.reconnects() == 0, "the steady pair lost its switch"
        return report

    def _end(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
        for traffic in (self.sender, self.receiver):
            self._run(traffic.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
