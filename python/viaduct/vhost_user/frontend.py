"""A front-end: drives any vhost-user back-end, ours or QEMU's, DPDK's and Open vSwitch's peers, without a VM.

# What it does

`start` connects (or listens for the back-end), negotiates features, shares one sealed memfd as guest memory, lays out
the rings at its beginning, hands over eventfds and starts the queues. Then the rings are the caller's: he puts buffers
into the memory from `data_addr` on, writes descriptors (see `viaduct._core.DriverQueue`), kicks `Queue.kick_fd` and
waits on `Queue.call_fd`. Guest-physical addresses equal offsets in the memory's file; user addresses are those plus
`user_base`.

When the back-end goes away, `lost` is set; `start` may be called again to do it all anew with the same memory, either
from the beginning (the rings are zeroed, so the caller makes his driver queues again) or where the rings stand
(`bases`).

Requests are sent one after the other, each with need_reply if the back-end knows REPLY_ACK, so an error is known at the
request that caused it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import msgspec

from viaduct.vhost_user import payloads as p
from viaduct.vhost_user.device import Peer
from viaduct.vhost_user.errors import FrontEndError, RequestError, VhostUserError
from viaduct.vhost_user.event_fd import drain
from viaduct.vhost_user.protocol import (
    ACK,
    BACK_END_REQUESTS,
    FRONT_END_BY_NAME,
    NACK,
    NEED_REPLY,
    REPLY,
    ProtocolFeature,
)
from viaduct.vhost_user.ring import PACKED_START, packed_base
from viaduct.vhost_user.ring_layout import place_rings
from viaduct.vhost_user.socket_path import Listener, connect, peer_of
from viaduct.vhost_user.wire import Channel, Message
from viaduct.virtio.features import DeviceFeature, DeviceType, describe_features
from viaduct.virtio.net_config import NetConfig
from viaduct.virtio.status import Status

log = logging.getLogger("viaduct.vhost_user")

REPLY_TIMEOUT = 30.0
"""Seconds after which a back-end that does not answer is given up."""

_WANTED_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Queue(msgspec.Struct, frozen=True):
    """A virtqueue that has been laid out; addresses are guest-physical and equal offsets in the memory's file."""

    index: int
    size: int
    """Descriptors."""
    descriptor_addr: int
    driver_addr: int
    """Available ring, or driver event suppression structure."""
    device_addr: int
    """Used ring, or device event suppression structure."""
    base: int
    """Where the ring starts, as in SET_VRING_BASE: fresh 0 for a split ring and 0x80008000 for a packed one."""
    kick_fd: int
    """The eventfd to write to after adding buffers. Owned by the front-end."""
    call_fd: int
    """The eventfd that the back-end writes to. Owned by the front-end."""


class FrontEnd:
    """One connection to a back-end.

    `path`: the socket; `server`: listen on it and wait for the back-end instead of connecting (testpmd's net_vhost
    with ``client=1``). `features` is what the driver can do (`viaduct.virtio`), of which the back-end's subset is
    taken; `required` must all be there. `queue_count` counts virtqueues: two for each queue pair of a network device.
    `queue_size` is one size for all or one for each. `memory_size` is in bytes, a multiple of the page size;
    `hugepages` takes the memory from hugetlbfs (2 MiB pages must be reserved). `track_inflight`: keep the back-end's
    record of requests in flight for the next one, if it has one (INFLIGHT_SHMFD).
    """

    def __init__(
        self,
        path: str,
        *,
        server: bool = False,
        device_id: int = DeviceType.NET,
        features: int = DeviceFeature.VERSION_1,
        required: int = 0,
        protocol_features: ProtocolFeature = _WANTED_PROTOCOL,
        queue_count: int = 2,
        queue_size: int | Sequence[int] = 256,
        memory_size: int = 64 << 20,
        hugepages: bool = False,
        user_base: int = 0,
        mtu: int | None = None,
        track_inflight: bool = False,
        name: str = "",
    ) -> None:
        self.path = str(path)
        self.server = server
        self.device_id = device_id
        self.name = name or self.path
        self.memory_size = memory_size
        self.user_base = user_base
        self.features = 0
        """Negotiated virtio features, without VHOST_USER_F_PROTOCOL_FEATURES; valid after `start`."""
        self.protocol_features = ProtocolFeature(0)
        """Negotiated protocol features."""
        self.queues: tuple[Queue, ...] = ()
        """The queues, as long as they run."""
        self.data_addr = 0
        """First guest-physical address behind the rings, on a page boundary: buffers go there."""
        self.mtu: int | None = mtu
        """The MTU asked of the back-end, or the one its configuration space tells; None: unknown."""
        self.config: NetConfig | None = None
        """A network back-end's configuration, if it offers CONFIG (most leave it to the front-end)."""
        self.peer: Peer | None = None
        self.lost = asyncio.Event()
        """Set when the back-end has gone or erred; cleared by `start`."""
        self.lost_reason = ""
        self.on_layout: Callable[[tuple[Queue, ...]], None] | None = None
        """Called when the rings have their places, before the back-end hears of them: a driver that writes its first
        values into them now cannot overwrite the device's."""
        self.on_config_change: Callable[[], None] | None = None
        """Called when the back-end says that its configuration space has changed; `read_config` gets it."""
        self._wanted = int(features)
        self._required = int(required)
        self._wanted_protocol = protocol_features | (
            ProtocolFeature.INFLIGHT_SHMFD if track_inflight else ProtocolFeature(0)
        )
        self._inflight: tuple[int, p.InflightDescription] | None = None
        self._sizes = [queue_size] * queue_count if isinstance(queue_size, int) else list(queue_size)
        self._channel: Channel | None = None
        self._listener: Listener | None = None
        self._reader: asyncio.Task[None] | None = None
        self._back_channel: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Message] | None = None
        self._turn = asyncio.Lock()
        self._has_protocol_features = False
        self._fds = contextlib.ExitStack()
        if len(self._sizes) != queue_count:
            raise VhostUserError(
                f"{len(self._sizes)} queue sizes for {queue_count} queues; give one size, or one for each"
            )
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if hugepages else 0)
        self.memory_fd = os.memfd_create(f"viaduct guest {self.name}"[:200], flags)
        """The memory's file: map it shared. Owned by the front-end, valid until `close`."""
        self._own(self.memory_fd)
        try:
            os.ftruncate(self.memory_fd, memory_size)
            fcntl.fcntl(self.memory_fd, fcntl.F_ADD_SEALS, _SEALS)
            self._events = [(self._new_event(), self._new_event()) for _ in self._sizes]
        except BaseException:
            self._fds.close()
            raise

    async def __aenter__(self) -> FrontEnd:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def layout(self) -> str:
        """``"packed"`` or ``"split"``, as negotiated."""
        return "packed" if self.features & DeviceFeature.RING_PACKED else "split"

    # Life.

    async def start(self, bases: Sequence[int] | None = None) -> None:
        """Connects, waiting for the back-end as long as it takes, and starts all queues.

        `bases` continues rings that are in the memory already, from these positions; without it they are zeroed and
        start afresh. Raises `FrontEndError` if the back-end refuses something or goes away, `SocketPathError` for a
        bad path.
        """
        if self._channel is not None:
            await self._disconnect("restarted")
        self.lost.clear()
        self.lost_reason = ""
        try:
            await self._connect()
            await self._negotiate()
            await self._share_memory()
            await self._share_inflight(fresh=bases is None)
            await self._start_queues(bases)
        except BaseException:
            await self._disconnect("the start failed")
            raise

    async def stop(self) -> list[int]:
        """Stops all queues and returns where they stand (GET_VRING_BASE); the connection stays. Raises
        `FrontEndError`."""
        bases = [(await self.request("GET_VRING_BASE", p.VringState(queue.index, 0))).num for queue in self.queues]
        if self.layout == "packed":
            bases = [packed_base(base) for base in bases]
        self.queues = ()
        if ProtocolFeature.STATUS in self.protocol_features:
            await self.request("SET_STATUS", p.U64(0))
        return bases

    async def close(self) -> None:
        """Stops the queues, if the back-end is still there, and gives up connection and memory. May be called twice."""
        if self._channel is not None and self.queues and not self.lost.is_set():
            with contextlib.suppress(FrontEndError):
                await self.stop()
        await self._disconnect("closed")
        self._drop_inflight()
        self._fds.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # What a driver asks for later.

    async def read_config(self, offset: int, size: int) -> bytes:
        """Reads configuration space (protocol feature CONFIG). Raises `FrontEndError`."""
        answer: p.Config = await self.request("GET_CONFIG", p.Config(offset, size, 0, bytes(size)))
        return answer.data

    async def enable(self, index: int, enabled: bool = True) -> None:
        """Enables or disables a queue. Raises `FrontEndError`."""
        await self.request("SET_VRING_ENABLE", p.VringState(index, int(enabled)))

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
                raise self._error(f"{name}: not connected: {self.lost_reason or 'start() comes first'}")
            waits = acked or request.reply is not None
            answered = self._answer = asyncio.get_running_loop().create_future() if waits else None
            try:
                await self._channel.send(request.number, NEED_REPLY if acked else 0, request.payload.pack(payload), fds)
                if answered is None:
                    return None
                message = await asyncio.wait_for(answered, REPLY_TIMEOUT)
            except TimeoutError:
                raise self._error(f"{name}: no answer in {REPLY_TIMEOUT:.0f} s ({request.section})") from None
            except OSError as error:
                raise self._error(f"{name}: connection lost: {error.strerror or error}") from error
            finally:
                self._answer = None
        with message.fds:
            if message.request != request.number or not message.is_reply:
                raise self._error(f"{name}: the answer is to request {message.request} ({request.section})")
            layout = request.reply or p.U64_PAYLOAD
            if request.refusal is not None and message.payload == request.refusal:
                raise self._error(f"{name}{tuple(payload)}: refused ({request.section})")
            try:
                answer = layout.parse(message.payload)
            except RequestError as error:
                raise self._error(f"{name}: wrong answer: {error}") from error
            if answered_fds is not None:
                while (fd := message.fds.take()) is not None:
                    answered_fds.append(fd)
        if acked and answer.value != 0:
            raise self._error(f"{name}{tuple(payload)}: refused with {answer.value:#x} ({request.section})")
        return answer if request.reply is not None else None

    # The steps of a start.

    async def _connect(self) -> None:
        if self.server:
            if self._listener is None:
                self._listener = Listener(self.path)
            sock = await self._listener.accept()
        else:
            sock = await connect(self.path)
        self.peer = peer_of(sock, self.path)
        self._channel = Channel(sock)
        self._reader = asyncio.create_task(self._read(self._channel), name=f"vhost-user front-end {self.name}")

    async def _negotiate(self) -> None:
        self.protocol_features = ProtocolFeature(0)
        offered = (await self.request("GET_FEATURES")).value
        self._has_protocol_features = bool(offered & DeviceFeature.PROTOCOL_FEATURES)
        if self._has_protocol_features:
            protocol = ProtocolFeature((await self.request("GET_PROTOCOL_FEATURES")).value) & self._wanted_protocol
            await self.request("SET_PROTOCOL_FEATURES", p.U64(int(protocol)))
            self.protocol_features = protocol
        await self.request("SET_OWNER")
        if missing := self._required & ~offered:
            raise self._error(
                f"it does not offer {describe_features(missing, self.device_id)}; it offers "
                f"{describe_features(offered, self.device_id)}"
            )
        await self._check_queue_count()
        if ProtocolFeature.BACKEND_REQ in self.protocol_features:
            await self._open_back_channel()
        await self._add_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self.features = offered & self._wanted & ~int(DeviceFeature.PROTOCOL_FEATURES)
        await self.request("SET_FEATURES", p.U64(self.features | offered & DeviceFeature.PROTOCOL_FEATURES))
        await self._add_status(Status.FEATURES_OK)
        if ProtocolFeature.CONFIG in self.protocol_features and self.device_id == DeviceType.NET:
            self.config = NetConfig.unpack(await self.read_config(0, len(NetConfig().pack())))
        if self.mtu is not None and ProtocolFeature.MTU in self.protocol_features:
            await self.request("NET_SET_MTU", p.U64(self.mtu))

    async def _check_queue_count(self) -> None:
        if ProtocolFeature.MQ not in self.protocol_features:
            return
        offered = (await self.request("GET_QUEUE_NUM")).value
        net = self.device_id == DeviceType.NET
        wanted = len(self._sizes) // 2 if net else len(self._sizes)
        if wanted > offered:
            what = "queue pairs" if net else "queues"
            raise self._error(f"it has {offered} {what}, {wanted} were asked for (GET_QUEUE_NUM)")

    async def _add_status(self, bits: Status) -> None:
        if ProtocolFeature.STATUS not in self.protocol_features:
            return
        status = (await self.request("GET_STATUS")).value if bits != Status.ACKNOWLEDGE | Status.DRIVER else 0
        await self.request("SET_STATUS", p.U64(status | bits))
        if bits & Status.FEATURES_OK and not (await self.request("GET_STATUS")).value & Status.FEATURES_OK:
            raise self._error(
                f"it does not accept features {describe_features(self.features, self.device_id)} (virtio 1.2, 3.1.1)"
            )

    async def _share_memory(self) -> None:
        region = p.Region(0, self.memory_size, self.user_base, 0)
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol_features:
            await self.request("ADD_MEM_REG", region, [self.memory_fd])
        else:
            await self.request("SET_MEM_TABLE", p.Regions((region,)), [self.memory_fd])

    async def _share_inflight(self, *, fresh: bool) -> None:
        if ProtocolFeature.INFLIGHT_SHMFD not in self.protocol_features:
            return
        if fresh:
            self._drop_inflight()
        if self._inflight is None:
            wanted = p.InflightDescription(0, 0, len(self._sizes), max(self._sizes))
            found: list[int] = []
            description = await self.request("GET_INFLIGHT_FD", wanted, answered_fds=found)
            if len(found) != 1:
                for fd in found:
                    os.close(fd)
                raise self._error(f"GET_INFLIGHT_FD: {len(found)} descriptors came instead of one")
            self._inflight = found[0], description
        fd, description = self._inflight
        await self.request("SET_INFLIGHT_FD", description, [fd])

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            os.close(self._inflight[0])
            self._inflight = None

    async def _start_queues(self, bases: Sequence[int] | None) -> None:
        places, self.data_addr = place_rings(self._sizes, self.features, self.memory_size)
        if bases is None:
            os.pwrite(self.memory_fd, bytes(self.data_addr), 0)
            bases = [PACKED_START if self.layout == "packed" else 0] * len(places)
        queues = []
        for index, (place, base, (kick_fd, call_fd)) in enumerate(zip(places, bases, self._events, strict=True)):
            drain(kick_fd)
            drain(call_fd)
            queues.append(
                Queue(index, place.size, place.descriptor, place.driver, place.device, base, kick_fd, call_fd)
            )
        if self.on_layout is not None:
            self.on_layout(tuple(queues))
        for queue in queues:
            await self.request("SET_VRING_CALL", p.VringFd(queue.index), [queue.call_fd])
        # Enabled before they start: what a driver sends through a disabled ring is discarded ("Ring states").
        if self._has_protocol_features:
            for queue in queues:
                await self.enable(queue.index)
        for queue in queues:
            await self._start_queue(queue)
        await self._add_status(Status.DRIVER_OK)
        await self.request("GET_FEATURES")  # Without REPLY_ACK, the answer says that all before it was carried out.
        self.queues = tuple(queues)

    async def _start_queue(self, queue: Queue) -> None:
        # SET_VRING_KICK comes last: back-ends start the ring when it comes.
        base = self.user_base
        await self.request("SET_VRING_NUM", p.VringState(queue.index, queue.size))
        await self.request("SET_VRING_BASE", p.VringState(queue.index, queue.base))
        await self.request(
            "SET_VRING_ADDR",
            p.VringAddr(
                vring=queue.index,
                flags=0,
                descriptor=base + queue.descriptor_addr,
                used=base + queue.device_addr,
                available=base + queue.driver_addr,
                log=0,
            ),
        )
        await self.request("SET_VRING_KICK", p.VringFd(queue.index), [queue.kick_fd])

    # The connection.

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
            self.queues = ()
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

    async def _disconnect(self, reason: str) -> None:
        self._lose(reason)
        tasks = [task for task in (self._reader, self._back_channel) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._reader = self._back_channel = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self.queues = ()

    def _error(self, text: str) -> FrontEndError:
        return FrontEndError(f"front-end {self.name} ({self.peer or self.path}): {text}")

    def _own(self, fd: int) -> None:
        self._fds.callback(os.close, fd)

    def _new_event(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._own(fd)
        return fd
