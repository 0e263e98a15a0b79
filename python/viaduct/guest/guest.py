"""`Guest`: a host on the network, in this process."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

import msgspec

from viaduct._core import Station
from viaduct.guest.errors import GuestError
from viaduct.guest.link import CONNECT_TIMEOUT, Link, LinkOptions
from viaduct.guest.mac import mac_text, parse_mac
from viaduct.guest.results import Datagrams, Latency, Ping, Stream

ECHO, SINK, SOURCE = 7, 9, 19
"""The ports of the services (RFC 862, 863, 864)."""
PATIENCE = 10.0
"""Seconds without an answer or any progress after which a stream is given up."""


class Guest:
    """A host with addresses of its own behind a vhost-user socket.

    `path`: the back-end's socket. `ip`: one address with its prefix length, as in ``10.0.0.1/24``, or several, of
    either IP version. `mac`: made from the first IPv4 address when not given, else random. `gateway`: a router, or one
    for each IP version. `options` and keyword arguments in its place: see `LinkOptions`.

    Raises `GuestError` for what cannot work.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ip: str | Iterable[str] = (),
        mac: str | None = None,
        gateway: str | Iterable[str] = (),
        name: str = "guest",
        connect_timeout: float | None = CONNECT_TIMEOUT,
        options: LinkOptions | None = None,
        **link: Any,
    ) -> None:
        self.path = os.fspath(path)
        self.name = name
        self.addresses = tuple(_interface(text) for text in ([ip] if isinstance(ip, str) else ip))
        self.mac = parse_mac(mac) if mac is not None else _mac_for(self.addresses)
        self.options = _options(options, link)
        self.options.features()
        self._gateways = [gateway] if isinstance(gateway, str) else list(gateway)
        self._connect_timeout = connect_timeout
        self._station: Station | None = None
        self._link: Link | None = None
        self._waiting: dict[int, asyncio.Future[tuple[str, dict[str, Any]]]] = {}
        self._services: int | None = None

    def __repr__(self) -> str:
        addresses = ", ".join(str(address) for address in self.addresses)
        return f"<Guest {self.name} {addresses} {mac_text(self.mac)} on {self.path}>"

    async def __aenter__(self) -> Guest:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Connects to the back-end and tells the network who is here. Raises `GuestError`."""
        if self._station is not None:
            raise GuestError(f"{self!r} has been started already")
        try:
            addresses = [(str(address.ip), address.network.prefixlen) for address in self.addresses]
            seed = int.from_bytes(os.urandom(7), "big")
            station = Station(self.mac, addresses, self._gateways, self.options.mtu, seed)
        except (ValueError, OSError) as error:
            raise GuestError(f"guest {self.name}: {error}") from error
        self._station = station
        asyncio.get_running_loop().add_reader(station.event_fd, self._take_events)
        try:
            self._link = Link(self.path, self.options, self.name, station)
            await self._link.start(self._connect_timeout)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Leaves the network. What still runs fails with `GuestError`. May be called twice."""
        if self._link is not None:
            await self._link.close()
            self._link = None
        station, self._station = self._station, None
        if station is not None:
            asyncio.get_running_loop().remove_reader(station.event_fd)
            station.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(GuestError(f"guest {self.name} was closed"))
        self._waiting.clear()
        self._services = None

    @property
    def link(self) -> Link:
        """The connection to the back-end: whether it is up, and what was negotiated."""
        if self._link is None:
            raise GuestError(f"{self!r} has not been started")
        return self._link

    async def ping(
        self, remote: str, *, count: int = 5, interval: float = 0.2, wait: float = 1.0, size: int = 56
    ) -> Ping:
        """Sends `count` echo requests of `size` bytes, one each `interval` seconds, and waits up to `wait` seconds
        for each reply. Over IPv4 a request larger than the MTU goes in fragments.

        Raises `GuestError` if the request is impossible; requests without an answer are no error.
        """
        if count < 1 or interval < 0 or wait <= 0 or size < 0:
            raise GuestError("ping: count must be 1 or more, interval and size not negative, wait more than 0")
        ticket = self._open().ping(_host(remote), count, interval, wait, size)
        _, fields = await self._outcome(ticket)
        fields["rtt"] = Latency.from_nanoseconds(fields.pop("summary"))
        return Ping(remote=remote, size=size, **fields)

    async def stream(
        self,
        remote: str,
        *,
        direction: Literal["send", "receive", "echo"] = "send",
        port: int | None = None,
        bytes: int | None = None,
        seconds: float | None = None,
        patience: float = PATIENCE,
    ) -> Stream:
        """Carries content that tells where it belongs over one TCP connection, for so many `bytes` or `seconds`
        (default: 5 s), to or from a service at `remote` (see `serve`), and checks every byte.

        A back-end that goes away and comes back within `patience` seconds interrupts the stream without ending it.
        Raises `GuestError` if there is no connection; what happens later is in the result's `error`.
        """
        if bytes is None and seconds is None:
            seconds = 5.0
        port = port if port is not None else {"send": SINK, "receive": SOURCE, "echo": ECHO}[direction]
        seed = int.from_bytes(os.urandom(8), "big")
        ticket = self._open().stream(_host(remote), port, direction, bytes, seconds, patience, seed)
        _, fields = await self._outcome(ticket)
        if fields["error"] and not fields["sent"] and not fields["received"]:
            raise GuestError(f"guest {self.name}: {fields['error']}")
        peer = _answer(fields["peer"])
        verified: bool | None = None
        mismatch = fields["first_mismatch"]
        if direction == "send":
            if peer is not None:
                verified = peer.get("verified") is True and peer.get("bytes") == fields["sent"]
                mismatch = peer.get("first_mismatch")
        elif fields["received"]:
            whole = direction == "receive" or fields["received"] == fields["sent"]
            verified = mismatch is None and whole
        return Stream(
            remote=remote,
            port=port,
            direction=direction,
            sent=fields["sent"],
            received=fields["received"],
            seconds=fields["elapsed"],
            verified=verified,
            first_mismatch=mismatch,
            peer=peer,
            error=fields["error"],
        )

    async def datagrams(
        self,
        remote: str,
        *,
        size: int = 1000,
        rate: float | None = 1000.0,
        port: int = SINK,
        count: int | None = None,
        seconds: float | None = None,
        patience: float = 2.0,
    ) -> Datagrams:
        """Sends UDP datagrams of `size` bytes, `rate` of them a second (None: as fast as they go), so many or for so
        long (default: 5 s), and asks the sink at `remote` what arrived. Raises `GuestError` if that is impossible.
        """
        if count is None and seconds is None:
            seconds = 5.0
        total = None if count is None else count * size
        seed = int.from_bytes(os.urandom(8), "big")
        ticket = self._open().datagrams(_host(remote), port, size, rate, total, seconds, patience, seed)
        _, fields = await self._outcome(ticket)
        peer = _answer(fields["peer"]) or {}
        return Datagrams(
            remote=remote,
            port=port,
            size=size,
            sent=fields["sent"],
            seconds=fields["elapsed"],
            received=peer.get("received"),
            duplicated=peer.get("duplicated"),
            reordered=peer.get("reordered"),
            corrupted=peer.get("corrupted"),
        )

    def serve(self, *, echo: int = ECHO, sink: int = SINK, source: int = SOURCE) -> None:
        """Opens the services for other guests: echo (TCP and UDP), a sink that says what it got (TCP and UDP) and a
        source (TCP). They run until `stop_serving` or `close`. Ping is always answered.
        """
        if self._services is not None:
            raise GuestError(f"guest {self.name} serves already")
        self._services = self._open().serve(echo, sink, source)
        self._expect(self._services).add_done_callback(lambda future: future.exception())

    async def stop_serving(self) -> None:
        """Closes the services."""
        if self._services is not None:
            ticket, self._services = self._services, None
            future = self._waiting[ticket]
            self._open().cancel(ticket)
            await future

    def announce(self) -> None:
        """Tells switches and neighbours again where this guest is."""
        self._open().announce()

    def counters(self) -> dict[str, int]:
        """Frames, bytes, drops, kicks and sleeps since the start."""
        return self._open().counters()

    def service_counters(self) -> dict[str, int]:
        """Connections, bytes, verified streams and datagrams of the services since the start."""
        return self._open().services()

    def _open(self) -> Station:
        if self._station is None:
            raise GuestError(f"{self!r} is not running; use it in `async with`, or call start()")
        return self._station

    def _expect(self, ticket: int) -> asyncio.Future[tuple[str, dict[str, Any]]]:
        future: asyncio.Future[tuple[str, dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        return future

    async def _outcome(self, ticket: int) -> tuple[str, dict[str, Any]]:
        try:
            return await self._expect(ticket)
        except asyncio.CancelledError:
            if self._station is not None:
                self._station.cancel(ticket)
            raise
        finally:
            self._waiting.pop(ticket, None)

    def _take_events(self) -> None:
        if self._station is None:
            return
        for ticket, kind, fields in self._station.take_events():
            if kind == "link-broken":
                if self._link is not None:
                    self._link.broken(fields["why"])
                continue
            future = self._waiting.get(ticket)
            if future is None or future.done():
                continue
            if kind == "failed":
                future.set_exception(GuestError(f"guest {self.name}: {fields['why']}"))
            else:
                future.set_result((kind, fields))


def _options(options: LinkOptions | None, link: dict[str, Any]) -> LinkOptions:
    if options is not None and link:
        raise GuestError("give either `options` or its fields as arguments")
    if unknown := sorted(set(link) - set(LinkOptions.__struct_fields__)):
        raise GuestError(f"a guest has no option {unknown[0]!r}; it has {', '.join(LinkOptions.__struct_fields__)}")
    return options if options is not None else LinkOptions(**link)


def _interface(text: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    try:
        if "/" not in text:
            raise ValueError
        return ipaddress.ip_interface(text)
    except ValueError:
        raise GuestError(f"{text!r} is no address with its prefix length; write 10.0.0.1/24 or fd00::1/64") from None


def _host(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise GuestError(f"{text!r} is not an IP address; names are not looked up") from None


def _mac_for(addresses: Iterable[ipaddress.IPv4Interface | ipaddress.IPv6Interface]) -> bytes:
    """A locally administered address (IEEE 802, 8.4): 02:00 and the IPv4 address, or random."""
    for address in addresses:
        if address.version == 4:
            return b"\x02\x00" + address.ip.packed
    return b"\x02" + os.urandom(5)


def _answer(line: str | None) -> dict[str, Any] | None:
    """What a sink said; None if it is no sink of ours."""
    if line is None:
        return None
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
