"""`viaduct demo`: see it work."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json


def demo(
    seconds: Annotated[float, typer.Option(metavar="N", min=0.5, max=3600, help="How long to stream each way.")] = 3.0,
    json: Json = False,
    qemu: Annotated[
        bool, typer.Option("--qemu", help="Boot two Linux machines instead of guests in this process.")
    ] = False,
) -> None:
    """Two guests talk over one switch.

    Both are in this process, each with a virtio driver and a TCP/IP stack of its own, and reach the switch as a virtual
    machine would: through a vhost-user socket. They ping each other and stream TCP both ways; every byte is checked.
    Needs no privilege and no other program.

    With --qemu they are two Linux machines in QEMU, which takes some seconds to boot and needs Debian packages: it says
    which are missing.
    """
    import asyncio
    import signal

    from viaduct.guest import GuestError
    from viaduct.switch.config import ConfigError

    from .failure import FAILED, Failure

    if qemu:
        from .demo_qemu import show
    else:
        from .demo_guests import show

    async def until_terminated() -> bool:
        task = asyncio.ensure_future(show(seconds, json))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        passed = asyncio.run(until_terminated())
    except BrokenPipeError:
        raise  # nobody reads what we say
    except (GuestError, ConfigError, OSError) as error:
        raise Failure(f"the demonstration failed: {error}", FAILED) from error
    except asyncio.CancelledError:
        raise Failure("the demonstration was ended", FAILED) from None
    if not passed:
        raise Failure("the demonstration failed: some of what was sent did not arrive", FAILED)
