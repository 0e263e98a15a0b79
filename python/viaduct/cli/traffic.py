"""`viaduct send` and `viaduct receive`: traffic and measurement on any vhost-user back-end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failure import FAILED, USAGE, Failure
from .guest import parse_number
from .link_options import LinkArguments, failures, with_link
from .options import Json

if TYPE_CHECKING:
    from viaduct.guest import Receiver, Sender

Mac = Annotated[str | None, typer.Option("--mac", metavar="MAC", help="First own MAC address.")]


@with_link
def send(
    link: LinkArguments,
    size: Annotated[int, typer.Option(metavar="BYTES", help="Frame, with Ethernet header, without checksum.")] = 64,
    rate: Annotated[str, typer.Option(metavar="PPS|max", help="Frames a second, as in 5000, 50k or 1.5M.")] = "max",
    seconds: Annotated[float | None, typer.Option(metavar="N", help="For how long [default: 5].")] = None,
    count: Annotated[int | None, typer.Option(metavar="N", help="How many, instead of for how long.")] = None,
    burst: Annotated[int, typer.Option(metavar="N", help="Frames that leave together, with a rate.")] = 1,
    flows: Annotated[int, typer.Option(metavar="N", help="Flows, numbered each on its own.")] = 1,
    macs: Annotated[int, typer.Option(metavar="N", help="Pairs of MAC addresses that the flows use.")] = 1,
    mac: Mac = None,
    dst: Annotated[str | None, typer.Option(metavar="MAC", help="First MAC address to send to.")] = None,
    json: Json = False,
) -> None:
    """Send frames with numbers, times and checksums, for `viaduct receive` to judge.

    \b
        viaduct receive --connect /tmp/vm2.sock &
        viaduct send --connect /tmp/vm1.sock --size 64 --rate max --seconds 5
        viaduct send --connect /tmp/vm1.sock --size 1514 --rate 50k --flows 100 --macs 10
        viaduct send --connect /tmp/vm1.sock --ring packed --count 1000000 --json
    """
    if seconds is not None and count is not None:
        raise Failure("give either --seconds or --count", USAGE)
    pace = None if rate == "max" else parse_number("--rate", rate)
    path, options = link.path, link.options()
    from viaduct.guest import Sender
    from viaduct.guest.traffic import RECEIVER_MAC, SENDER_MAC

    async def run() -> None:
        with failures(USAGE):
            sender = Sender(
                path,
                size=size,
                rate=pace,
                burst=burst,
                flows=flows,
                macs=macs,
                mac=mac or SENDER_MAC,
                dst=dst or RECEIVER_MAC,
                connect_timeout=link.timeout,
                options=options,
            )
        with failures(FAILED):
            async with sender:
                running = asyncio.create_task(sender.run(seconds=seconds, count=count))
                await _finish(running)
                sent = sender.report() if running.cancelled() else running.result()
                if json:
                    _print(sender, sent, frames_per_second=sent.frames_per_second, bits_per_second=sent.bits_per_second)
                else:
                    print(
                        f"sent {sent.sent} frames of {sent.size} bytes in {sent.seconds:.2f} s: "
                        f"{_rate(sent.frames_per_second, sent.bits_per_second)}"
                    )

    asyncio.run(run())


@with_link
def receive(
    link: LinkArguments,
    seconds: Annotated[
        float | None, typer.Option(metavar="N", help="For how long [default: until the traffic ends, or Ctrl-C].")
    ] = None,
    count: Annotated[int | None, typer.Option(metavar="N", help="Until so many frames have come.")] = None,
    macs: Annotated[int, typer.Option(metavar="N", help="MAC addresses to announce.")] = 1,
    mac: Mac = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check every byte, or only numbers and times.")
    ] = True,
    json: Json = False,
) -> None:
    """Receive the frames of `viaduct send` and tell rate, loss, order, content and latency.

    Without --seconds it ends half a second after the traffic has. Exit code 1 if nothing came or content was wrong.

    \b
        viaduct receive --connect /tmp/vm2.sock
        viaduct receive --connect /tmp/vm2.sock --macs 10 --seconds 30 --json
    """
    path, options = link.path, link.options()
    from viaduct.guest import Receiver
    from viaduct.guest.traffic import RECEIVER_MAC

    async def run() -> None:
        with failures(USAGE):
            receiver = Receiver(
                path,
                mac=mac or RECEIVER_MAC,
                macs=macs,
                verify=verify,
                count=count,
                connect_timeout=link.timeout,
                options=options,
            )
        with failures(FAILED):
            async with receiver:
                await _finish(asyncio.create_task(_traffic_ends(receiver, seconds)))
                found = receiver.report()
                if json:
                    _print(
                        receiver,
                        found,
                        frames_per_second=found.frames_per_second,
                        bits_per_second=found.bits_per_second,
                    )
                else:
                    _show(found)
                if found.corrupted:
                    raise Failure(f"the content of {found.corrupted} frames was wrong")
                if not found.received:
                    raise Failure(
                        "no frame came; send some from another port of the back-end: viaduct send --connect PATH"
                    )

    asyncio.run(run())


async def _traffic_ends(receiver: Receiver, seconds: float | None) -> None:
    if seconds is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await receiver.wait_done()
        return
    await receiver.begun()
    await receiver.finish(0.5)


async def _finish(task: asyncio.Task[Any]) -> None:
    """Waits for the task; Ctrl-C or SIGTERM ends it early."""
    import signal

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await asyncio.wait([task])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _show(found: Any) -> None:
    print(
        f"received {found.received} frames, {found.bytes} bytes in {found.seconds:.2f} s: "
        f"{_rate(found.frames_per_second, found.bits_per_second)}"
    )
    print(
        f"lost {found.lost}, duplicated {found.duplicated}, reordered {found.reordered}, corrupted {found.corrupted}, "
        f"flows {found.flows}"
    )
    if (latency := found.latency) is not None:
        print(
            f"latency median {latency.p50_us:.1f} us, p90 {latency.p90_us:.1f} us, p99 {latency.p99_us:.1f} us, "
            f"p99.9 {latency.p999_us:.1f} us, max {latency.max_us:.1f} us"
        )


def _rate(frames: float, bits: float) -> str:
    return f"{frames / 1e6:.3f} Mpps, {bits / 1e9:.3f} Gbit/s"


def _print(traffic: Sender | Receiver, result: Any, **derived: Any) -> None:
    import msgspec

    from .link_options import describe_link
    from .output import print_json

    link = describe_link(traffic.path, traffic.link.features, traffic.counters())
    print_json({**msgspec.to_builtins(result), **derived, "link": link})
