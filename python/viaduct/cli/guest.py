"""`viaduct guest`: a host in this process, on any vhost-user back-end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failure import FAILED, USAGE, Failure
from .link_options import LinkArguments, failures, with_link
from .options import Json

if TYPE_CHECKING:
    from viaduct.guest import Guest

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="A guest in this process: it needs no virtual machine, only a vhost-user back-end's socket.",
)

Ip = Annotated[
    list[str] | None,
    typer.Option("--ip", metavar="ADDRESS/PREFIX", help="Own address, of either IP version; repeatable."),
]
Mac = Annotated[str | None, typer.Option("--mac", metavar="MAC", help="Own MAC address [default: from the address].")]
Gateway = Annotated[
    list[str] | None, typer.Option("--gateway", metavar="ADDRESS", help="Router, one for each IP version; repeatable.")
]
Remote = Annotated[str, typer.Argument(metavar="[ADDRESS]", help="Whom to talk to.", show_default=True)]

CLIENT, SERVER = "10.0.0.1/24", "10.0.0.2/24"
"""Who the guests are unless told otherwise: so a client finds a server."""


@app.command("ping")
@with_link
def ping(
    link: LinkArguments,
    remote: Remote = "10.0.0.2",
    ip: Ip = None,
    mac: Mac = None,
    gateway: Gateway = None,
    count: Annotated[int, typer.Option("--count", "-c", metavar="N", help="Requests.")] = 5,
    interval: Annotated[float, typer.Option("--interval", "-i", metavar="SECONDS", help="Between two requests.")] = 0.2,
    size: Annotated[int, typer.Option("--size", "-s", metavar="BYTES", help="Payload of a request.")] = 56,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long a reply may take.")] = 1.0,
    json: Json = False,
) -> None:
    """Ping a host through a back-end.

    Exit code 1 if nobody answers.

    \b
        viaduct guest ping --connect /tmp/vm1.sock
        viaduct guest ping 10.1.0.9 --connect /tmp/vm1.sock --ip 10.1.0.1/16 --size 8000 --mtu 9000
        viaduct guest ping fd00::2 --connect /tmp/vm1.sock --ip fd00::1/64 --ring packed --no-mrg
    """

    async def run(guest: Guest) -> None:
        result = await guest.ping(remote, count=count, interval=interval, wait=timeout, size=size)
        if json:
            _print_result(guest, result, lost=result.lost)
        else:
            print(f"{result.remote}: {result.sent} sent, {result.received} received, {result.lost} lost")
            if result.duplicated or result.corrupted:
                print(f"{result.duplicated} replies twice or too late, {result.corrupted} with wrong content")
            if result.rtt is not None:
                print(_latency("round trip", result.rtt))
        if not result.received:
            raise Failure(
                f"{remote} does not answer; is there a host with this address (viaduct guest serve --ip {remote}/24), "
                "and does the back-end forward between the two?"
            )

    _run(link, ip or [CLIENT], mac, gateway, run)


@app.command("stream")
@with_link
def stream(
    link: LinkArguments,
    remote: Remote = "10.0.0.2",
    ip: Ip = None,
    mac: Mac = None,
    gateway: Gateway = None,
    seconds: Annotated[float | None, typer.Option(metavar="N", help="For how long [default: 5].")] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", metavar="N[k|M|G]", help="How much, instead of for how long.")
    ] = None,
    direction: Annotated[str, typer.Option(metavar="send|receive|echo", help="Which way the content goes.")] = "send",
    udp: Annotated[bool, typer.Option("--udp", help="Datagrams instead of a TCP connection.")] = False,
    datagram: Annotated[int, typer.Option(metavar="BYTES", help="With --udp: payload of each.")] = 1000,
    rate: Annotated[str, typer.Option(metavar="N|max", help="With --udp: datagrams a second.")] = "1000",
    port: Annotated[int | None, typer.Option(metavar="N", help="The service's port [default: 9, 19 or 7].")] = None,
    json: Json = False,
) -> None:
    """Stream content to a service and check every byte.

    The other side is `viaduct guest serve`. Any other TCP server will do for sending, but cannot say what it got.

    \b
        viaduct guest stream --connect /tmp/vm1.sock --seconds 10
        viaduct guest stream --connect /tmp/vm1.sock --bytes 64M --direction echo
        viaduct guest stream --connect /tmp/vm1.sock --udp --rate 50000
    """
    if direction not in ("send", "receive", "echo"):
        raise Failure(f"--direction {direction}: send, receive or echo", USAGE)
    if seconds is not None and size is not None:
        raise Failure("give either --seconds or --bytes", USAGE)
    total = None if size is None else parse_size(size)

    async def run_tcp(guest: Guest) -> None:
        result = await guest.stream(remote, direction=direction, port=port, bytes=total, seconds=seconds)  # type: ignore[arg-type]
        if json:
            _print_result(guest, result, bits_per_second=result.bits_per_second)
        else:
            print(result)
        if result.error:
            raise Failure(f"the stream ended early: {result.error}")
        if result.verified is False:
            raise Failure(f"the content is wrong from byte {result.first_mismatch} on")

    async def run_udp(guest: Guest) -> None:
        pace = None if rate == "max" else parse_number("--rate", rate)
        number = None if total is None else -(-total // datagram)
        result = await guest.datagrams(remote, size=datagram, rate=pace, port=port or 9, count=number, seconds=seconds)
        if json:
            _print_result(guest, result, lost=result.lost, rate=result.rate)
        elif result.received is None:
            print(f"{remote}: {result.sent} datagrams sent; nobody there says what arrived (viaduct guest serve does)")
        else:
            print(
                f"{remote}: {result.sent} datagrams sent, {result.rate:.0f}/s, {result.received} received, "
                f"{result.lost} lost, {result.duplicated} twice, {result.reordered} out of order, "
                f"{result.corrupted} corrupted"
            )
        if result.corrupted:
            raise Failure("content was wrong on arrival")

    _run(link, ip or [CLIENT], mac, gateway, run_udp if udp else run_tcp)


@app.command("serve")
@with_link
def serve(
    link: LinkArguments,
    ip: Ip = None,
    mac: Mac = None,
    gateway: Gateway = None,
    seconds: Annotated[float | None, typer.Option(metavar="N", help="For how long [default: until Ctrl-C].")] = None,
    echo: Annotated[int, typer.Option(metavar="PORT", help="Gives back what it gets; TCP and UDP.")] = 7,
    sink: Annotated[int, typer.Option(metavar="PORT", help="Takes, checks and tells; TCP and UDP.")] = 9,
    source: Annotated[int, typer.Option(metavar="PORT", help="Gives content; TCP.")] = 19,
    json: Json = False,
) -> None:
    """Be a host that others can ping and stream to.

    Any program can use the services; the sink answers in one line what arrived:

    \b
        viaduct guest serve --connect /tmp/vm2.sock --ip 10.0.0.2/24
        (in another guest)  nc -N 10.0.0.2 9 < file
    """

    async def run(guest: Guest) -> None:
        guest.serve(echo=echo, sink=sink, source=source)
        if not json:
            names = ", ".join(str(address) for address in guest.addresses)
            print(f"{names} serves echo on {echo}, sink on {sink}, source on {source}; Ctrl-C ends it", flush=True)
        await _until_told(seconds)
        counts = guest.service_counters()
        if json:
            _print_result(guest, counts)
        else:
            print(", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items()))

    _run(link, ip or [SERVER], mac, gateway, run)


def parse_number(option: str, text: str) -> float:
    """A number greater than 0, with a k, M or G perhaps. Raises `Failure`."""
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
    try:
        number = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise Failure(f"{option} {text}: a number greater than 0, as in 5000, 64k or 1.5M", USAGE)
    return number


def parse_size(text: str) -> int:
    """Bytes; k, M and G are powers of 1024. Raises `Failure`."""
    factor = {"k": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    try:
        number = int(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise Failure(f"--bytes {text}: a number of bytes, as in 1000, 64k, 64M or 1.5G", USAGE)
    return number


def _run(
    link: LinkArguments,
    ip: list[str],
    mac: str | None,
    gateway: list[str] | None,
    work: Callable[[Guest], Awaitable[None]],
) -> None:
    path, options = link.path, link.options()
    from viaduct.guest import Guest

    async def run() -> None:
        with failures(USAGE):
            guest = Guest(
                path,
                ip=ip,
                mac=mac,
                gateway=gateway or (),
                options=options,
                connect_timeout=link.timeout,
            )
        with failures(FAILED):
            async with guest:
                await work(guest)

    asyncio.run(run())


async def _until_told(seconds: float | None) -> None:
    """Returns after so long, or at Ctrl-C or SIGTERM."""
    import signal

    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    try:
        async with asyncio.timeout(seconds):
            await told.wait()
    except TimeoutError:
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _print_result(guest: Guest, result: Any, **derived: Any) -> None:
    import msgspec

    from .link_options import describe_link
    from .output import print_json

    link = describe_link(guest.path, guest.link.features, guest.counters())
    print_json({**msgspec.to_builtins(result), **derived, "link": link})


def _latency(what: str, latency: Any) -> str:
    return (
        f"{what}: min {latency.min_us:.0f} us, median {latency.p50_us:.0f} us, p99 {latency.p99_us:.0f} us, "
        f"max {latency.max_us:.0f} us"
    )
