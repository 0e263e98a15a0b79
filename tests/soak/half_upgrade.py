"""A new switch process that fails: ``python half_upgrade.py CONTROL STEP``.

It takes over like `viaduct upgrade` and is killed, by its own hand, at a step: `asked` (before anything was described),
`described` (all memory mapped), `positions` (it knows where the rings stand, and has not touched them), `started` (it
has forwarded for a while and said nothing). At `silent` it stops there and lives on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from viaduct import Switch
from viaduct.switch.config import SwitchConfig
from viaduct.switch.handover_channel import HandoverChannel
from viaduct.switch.handover_format import HandoverMessage, Prepared, Running
from viaduct.switch.handover_taking import Predecessor
from viaduct.vhost_user.handover import Fds

STEPS = ("asked", "described", "positions", "started", "silent")
FORWARDING = 0.2
"""Seconds for which the process forwards at the step `started`."""


class FailingChannel(HandoverChannel):
    """Fails at the step that it was made for."""

    step = ""

    async def send(self, message: HandoverMessage, fds: Fds | None = None) -> None:
        if isinstance(message, Prepared) and self.step == "described":
            die()
        if isinstance(message, Running) and self.step in ("started", "silent"):
            await asyncio.sleep(FORWARDING if self.step == "started" else 3600)
            die()
        await super().send(message, fds)

    async def receive(self, within: float) -> tuple[HandoverMessage, Fds]:
        received = await super().receive(within)
        if type(received[0]).__name__ == "PositionsData" and self.step == "positions":
            die()
        return received


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(control: str, step: str) -> None:
    predecessor = await Predecessor.find(control, lambda _: None)
    if step == "asked":
        die()
    channel = FailingChannel(predecessor.channel.sock)
    channel.step, predecessor.channel = step, channel
    async with Switch() as switch:
        await predecessor.prepare(switch, SwitchConfig())
        await predecessor.relieve(switch)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
