"""The connection of a front-end to its back-end: what every front-end does, whoever drives the rings.

`connect` reaches the back-end, `negotiate` settles the protocol and learns what the device offers, `set_features` says
what the driver takes of it, `start_ring` starts one virtqueue. Memory, and where the rings lie in it, is the business
of whoever uses this: `viaduct.vhost_user.FrontEnd` has rings of its own, a virtual machine those of its guest.

Requests are sent one after the other, each with need_reply if the back-end knows REPLY_ACK, so an error is known at the
request that caused it. When the back-end goes away, `lost` is set.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

from viaduct.vhost_user import payloads as p
from viaduct.vhost_user.device import Peer
from viaduct.vhost_user.errors import FrontEndError, RequestError, VhostUserError
from viaduct.vhost_user.protocol import (
    ACK,
    BACK_END_REQUESTS,
    FRONT_END_BY_NAME,
    NACK,
    NEED_REPLY,
    REPLY,
    ProtocolFeature,
)
from viaduct.vhost_user.ring import packed_base
from viaduct.vhost_user.socket_path import Listener, connect, peer_of
from viaduct.vhost_user.wire import Channel, Message
from viaduct.virtio.features import DeviceFeature, DeviceType, describe_features
from viaduct.virtio.status import Status

log = logging.getLogger("viaduct.vhost_user")

REPLY_TIMEOUT = 30.0
"""Seconds after which a back-end that does not answer is given up."""

WANTED_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""What a front-end takes of the protocol features unless told otherwise."""


class Connection:
    """One connection to a back-end.

    `path`: the socket; `server`: listen on it and wait for the back-end instead of connecting. `device_id` says what is
    expected there, `protocol_features` which of them are wanted, `queue_count` how many virtqueues.
    """

    def __init__(
        self,
        path: str,
        *,
        server: bool = False,
        device_id: int = DeviceType.NET,
        protocol_features: ProtocolFeature = WANTED_PROTOCOL,
        queue_count: int = 2,
        name: str = "",
    ) -> None:
        self.path = str(path)
        self.server = server
        self.device_id = device_id
        self.name = name or self.path
        self.queue_count = queue_count
        self.offered = 0
        """Virtio features that the back-end offers, without VHOST_USER_F_PROTOCOL_FEATURES."""
        self.features = 0
        """Negotiated virtio features, without VHOST_USER_F_PROTOCOL_FEATURES."""
        self.protocol_features = ProtocolFeature(0)
        """Negotiated protocol features."""
        self.has_protocol_features = False
        """Whether the back-end knows VHOST_USER_F_PROTOCOL_FEATURES: then its rings start disabled."""
        self.peer: Peer | None = None
        self.lost = asyncio.Event()
        """Set when the back-end has gone or erred; cleared by `connect`."""
        self.lost_reason = ""
        self.on_config_change: Callable[[], None] | None = None
        """Called when the back-end says that its configuration space has changed; `read_config` gets it."""
        self._wanted_protocol = protocol_features
        self._channel: Channel | None = None
        self._listener: Listener | None = None
        self._reader: asyncio.Task[None] | None = None
        self._back_channel: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Message] | None = None
        self._turn = asyncio.Lock()

    @property
    def layout(self) -> str:
        """``"packed"`` or ``"split"``, as negotiated."""
        return "packed" if self.features & DeviceFeature.RING_PACKED else "split"

    @property
    def connected(self) -> bool:
        """Whether there is a back-end that has not been lost."""
        return self._channel is not None and not self.lost.is_set()

    async def connect(self) -> None:
        """Reaches the back-end, waiting as long as it takes; whatever was there before is given up. Raises
        `SocketPathError` for a bad path."""
        if self._channel is not None:
            await self.disconnect("connecting anew")
        self.lost.clear()
        self.lost_reason = ""
        if self.server:
            if self._listener is None:
                self._listener = Listener(self.path)
            sock = await self._listener.accept()
        else:
            sock = await connect(self.path)
        self.peer = peer_of(sock, self.path)
        self._channel = Channel(sock)
        self._reader = asyncio.create_task(self._read(self._channel), name=f"vhost-user front-end {self.name}")

    async def negotiate(self) -> None:
        """Settles the protocol features and learns what the device offers. Raises `FrontEndError`."""
        self.protocol_features = ProtocolFeature(0)
        offered = (await self.request("GET_FEATURES")).value
        self.has_protocol_features = bool(offered & DeviceFeature.PROTOCOL_FEATURES)
        self.offered = offered & ~int(DeviceFeature.PROTOCOL_FEATURES)
        if self.has_protocol_features:
            protocol = ProtocolFeature((await self.request("GET_PROTOCOL_FEATURES")).value) & self._wanted_protocol
            await self.request("SET_PROTOCOL_FEATURES", p.U64(int(protocol)))
            self.protocol_features = protocol
        await self.request("SET_OWNER")

    def require(self, features: int) -> None:
        """Raises `FrontEndError` unless the device offers all of `features`."""
        if missing := features & ~self.offered & ~int(DeviceFeature.PROTOCOL_FEATURES):
            raise self.error(
                f"it does not offer {describe_features(missing, self.device_id)}; it offers "
                f"{describe_features(self.offered, self.device_id)}"
            )

    async def check_queue_count(self) -> None:
        """Raises `FrontEndError` if the back-end has fewer queues than wanted."""
        net = self.device_id == DeviceType.NET
        if ProtocolFeature.MQ not in self.protocol_features:
            if net and self.queue_count > 2:
                raise self.error(f"it has one queue pair (no MQ), {self.queue_count // 2} were asked for")
            return
        offered = (await self.request("GET_QUEUE_NUM")).value
        wanted = self.queue_count // 2 if net else self.queue_count
        if wanted > offered:
            what = "queue pairs" if net else "queues"
            raise self.error(f"it has {offered} {what}, {wanted} were asked for (GET_QUEUE_NUM)")

    async def set_features(self, features: int) -> None:
        """Tells the device what the driver takes, and opens the channel for the device's own requests. Raises
        `FrontEndError`."""
        if ProtocolFeature.BACKEND_REQ in self.protocol_features and self._back_channel is None:
            await self._open_back_channel()
        await self.add_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self.features = features & ~int(DeviceFeature.PROTOCOL_FEATURES)
        bit = int(DeviceFeature.PROTOCOL_FEATURES) if self.has_protocol_features else 0
        await self.request("SET_FEATURES", p.U64(self.features | bit))
        await self.add_status(Status.FEATURES_OK)

    async def add_status(self, bits: Status) -> None:
        """Adds bits to the device's status field, if the back-end keeps one. Raises `FrontEndError`."""
        if ProtocolFeature.STATUS not in self.protocol_features:
            return
        status = (await self.request("GET_STATUS")).value if bits != Status.ACKNOWLEDGE | Status.DRIVER else 0
        await self.request("SET_STATUS", p.U64(status | bits))
        if bits & Status.FEATURES_OK and not (await self.request("GET_STATUS")).value & Status.FEATURES_OK:
            raise self.error(
                f"it does not accept features {describe_features(self.features, self.device_id)} (virtio 1.2, 3.1.1)"
            )

    async def start_ring(self, size: int, base: int, addr: p.VringAddr, kick_fd: int) -> None:
        """Starts the ring that `addr` describes. Raises `FrontEndError`."""
        # SET_VRING_KICK comes last: back-ends start the ring when it comes.
        index = addr.vring
        await self.request("SET_VRING_NUM", p.VringState(index, size))
        await self.request("SET_VRING_BASE", p.VringState(index, base))
        await self.request("SET_VRING_ADDR", addr)
        await self.request("SET_VRING_KICK", p.VringFd(index), [kick_fd])

    async def stop_ring(self, index: int) -> int:
        """Stops a ring and returns where it stands, as in `viaduct.vhost_user.Vring.base`. Raises `FrontEndError`."""
        base: int = (await self.request("GET_VRING_BASE", p.VringState(index, 0))).num
        return packed_base(base) if self.layout == "packed" else base

    async def enable(self, index: int, enabled: bool = True) -> None:
        """Enables or disables a queue. Raises `FrontEndError`."""
        await self.request("SET_VRING_ENABLE", p.VringState(index, int(enabled)))

    async def read_config(self, offset: int, size: int) -> bytes:
        """Reads configuration space (protocol feature CONFIG). Raises `FrontEndError`."""
        answer: p.Config = await self.request("GET_CONFIG", p.Config(offset, size, 0, bytes(size)))
        return answer.data

    async def request(
        self, name: str, payload: Any = (), fds: Iterable[int] = (), answered_fds: list[int] | None = None
    ) -> Any:
        """Sends the request `name` of the protocol table; returns its answer's payload, None if it has none.

        Descriptors that come with the answer are added to `answered_fds` for the caller to close.

        Raises `FrontEndError` if it was refused, wrongly answered or not answered.
        """
        request = FRONT_END_BY_NAME[name]
        acked = request.reply is None and ProtocolFeature.REPLY_ACK in self.protocol_features
        async with self._turn:
            if self._channel is None or self.lost.is_set():
                raise self.error(f"{name}: not connected: {self.lost_reason or 'start() comes first'}")
            waits = acked or request.reply is not None
            answered = self._answer = asyncio.get_running_loop().create_future() if waits else None
            try:
                await self._channel.send(request.number, NEED_REPLY if acked else 0, request.payload.pack(payload), fds)
                if answered is None:
                    return None
                # Not wait_for: in Python 3.11 that loses a cancellation that comes together with the answer.
                async with asyncio.timeout(REPLY_TIMEOUT):
                    message = await answered
            except TimeoutError:
                raise self.error(f"{name}: no answer in {REPLY_TIMEOUT:.0f} s ({request.section})") from None
            except OSError as error:
                self._lose(error.strerror or str(error))  # The reader may not know it yet.
                raise self.error(f"{name}: connection lost: {error.strerror or error}") from error
            finally:
                self._answer = None
        with message.fds:
            if message.request != request.number or not message.is_reply:
                raise self.error(f"{name}: the answer is to request {message.request} ({request.section})")
            layout = request.reply or p.U64_PAYLOAD
            if request.refusal is not None and message.payload == request.refusal:
                raise self.error(f"{name}{tuple(payload)}: refused ({request.section})")
            try:
                answer = layout.parse(message.payload)
            except RequestError as error:
                raise self.error(f"{name}: wrong answer: {error}") from error
            if answered_fds is not None:
                while (fd := message.fds.take()) is not None:
                    answered_fds.append(fd)
        if acked and answer.value != 0:
            raise self.error(f"{name}{tuple(payload)}: refused with {answer.value:#x} ({request.section})")
        return answer if request.reply is not None else None

    async def disconnect(self, reason: str) -> None:
        """Gives the connection up."""
        self._lose(reason)
        tasks = [task for task in (self._reader, self._back_channel) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._reader = self._back_channel = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def end(self) -> None:
        """Gives up the connection, and the socket that was listened on. May be called twice."""
        await self.disconnect("closed")
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def error(self, text: str) -> FrontEndError:
        """An error that names this front-end and its peer."""
        return FrontEndError(f"front-end {self.name} ({self.peer or self.path}): {text}")

    async def _read(self, channel: Channel) -> None:
        """Takes answers to whoever waits for one, until the back-end goes."""
        reason = "the back-end closed the connection"
        try:
            while (message := await channel.receive()) is not None:
                if self._answer is None or self._answer.done():
                    message.fds.close()
                    reason = f"the back-end sent an answer to request {message.request} that nobody asked for"
                    break
                self._answer.set_result(message)
        except (VhostUserError, OSError) as error:
            reason = str(error)
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        if not self.lost.is_set():
            self.lost_reason = reason
            self.lost.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionAbortedError(reason))

    async def _open_back_channel(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._back_channel = asyncio.create_task(self._serve_back_channel(Channel(ours)))
            await self.request("SET_BACKEND_REQ_FD", (), [theirs.fileno()])

    async def _serve_back_channel(self, channel: Channel) -> None:
        """Serves the back-end's own requests (vhost-user, "Back-end message types")."""
        try:
            while (message := await channel.receive()) is not None:
                with message.fds:
                    request = BACK_END_REQUESTS.get(message.request)
                    known = request is not None and request.name == "BACKEND_CONFIG_CHANGE_MSG"
                    if known and self.on_config_change is not None:
                        self.on_config_change()
                    elif not known:
                        name = request.name if request is not None else f"request {message.request}"
                        log.error("front-end %s (%s): refused %s: it was not negotiated", self.name, self.peer, name)
                    if message.need_reply:
                        await channel.send(message.request, REPLY, ACK if known else NACK)
        except (VhostUserError, OSError) as error:
            log.error("front-end %s (%s): back-end channel: %s", self.name, self.peer, error)
        finally:
            channel.close()


class InflightKeeper:
    """The buffer of requests in flight that a front-end keeps for the next back-end (vhost-user, "Inflight I/O
    tracking")."""

    def __init__(self) -> None:
        self._kept: tuple[int, p.InflightDescription] | None = None

    async def share(self, connection: Connection, sizes: Iterable[int]) -> None:
        """Gives the buffer to the back-end, having asked it for one if there is none yet. Raises `FrontEndError`."""
        if ProtocolFeature.INFLIGHT_SHMFD not in connection.protocol_features:
            return
        if self._kept is None:
            sizes = tuple(sizes)
            wanted = p.InflightDescription(0, 0, len(sizes), max(sizes))
            found: list[int] = []
            description = await connection.request("GET_INFLIGHT_FD", wanted, answered_fds=found)
            if len(found) != 1:
                for fd in found:
                    os.close(fd)
                raise connection.error(f"GET_INFLIGHT_FD: {len(found)} descriptors came instead of one")
            self._kept = found[0], description
        fd, description = self._kept
        await connection.request("SET_INFLIGHT_FD", description, [fd])

    def drop(self) -> None:
        """The rings start afresh: what was in flight does not count any more."""
        if self._kept is not None:
            os.close(self._kept[0])
            self._kept = None
