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
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Sequence
from types import TracebackType

import msgspec

from viaduct.vhost_user import payloads as p
from viaduct.vhost_user.connection import WANTED_PROTOCOL, Connection, InflightKeeper
from viaduct.vhost_user.errors import FrontEndError, VhostUserError
from viaduct.vhost_user.event_fd import drain
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.vhost_user.ring import PACKED_START
from viaduct.vhost_user.ring_layout import place_rings
from viaduct.virtio.features import DeviceFeature, DeviceType
from viaduct.virtio.net_config import NetConfig
from viaduct.virtio.status import Status

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


class FrontEnd(Connection):
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
        protocol_features: ProtocolFeature = WANTED_PROTOCOL,
        queue_count: int = 2,
        queue_size: int | Sequence[int] = 256,
        memory_size: int = 64 << 20,
        hugepages: bool = False,
        user_base: int = 0,
        mtu: int | None = None,
        track_inflight: bool = False,
        name: str = "",
    ) -> None:
        if track_inflight:
            protocol_features |= ProtocolFeature.INFLIGHT_SHMFD
        super().__init__(
            path,
            server=server,
            device_id=device_id,
            protocol_features=protocol_features,
            queue_count=queue_count,
            name=name,
        )
        self.memory_size = memory_size
        self.user_base = user_base
        self.queues: tuple[Queue, ...] = ()
        """The queues, as long as they run."""
        self.data_addr = 0
        """First guest-physical address behind the rings, on a page boundary: buffers go there."""
        self.mtu: int | None = mtu
        """The MTU asked of the back-end, or the one its configuration space tells; None: unknown."""
        self.config: NetConfig | None = None
        """A network back-end's configuration, if it offers CONFIG (most leave it to the front-end)."""
        self.on_layout: Callable[[tuple[Queue, ...]], None] | None = None
        """Called when the rings have their places, before the back-end hears of them: a driver that writes its first
        values into them now cannot overwrite the device's."""
        self._wanted = int(features)
        self._required = int(required)
        self._inflight = InflightKeeper()
        self._sizes = [queue_size] * queue_count if isinstance(queue_size, int) else list(queue_size)
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

    # Life.

    async def start(self, bases: Sequence[int] | None = None) -> None:
        """Connects, waiting for the back-end as long as it takes, and starts all queues.

        `bases` continues rings that are in the memory already, from these positions; without it they are zeroed and
        start afresh. Raises `FrontEndError` if the back-end refuses something or goes away, `SocketPathError` for a
        bad path.
        """
        try:
            await self.connect()
            await self.negotiate()
            self.require(self._required)
            await self.check_queue_count()
            await self.set_features(self.offered & self._wanted)
            await self._learn_network()
            await self._share_memory()
            if bases is None:
                self._inflight.drop()
            await self._inflight.share(self, self._sizes)
            await self._start_queues(bases)
        except BaseException:
            await self.disconnect("the start failed")
            raise

    async def stop(self) -> list[int]:
        """Stops all queues and returns where they stand (GET_VRING_BASE); the connection stays. Raises
        `FrontEndError`."""
        bases = [await self.stop_ring(queue.index) for queue in self.queues]
        self.queues = ()
        if ProtocolFeature.STATUS in self.protocol_features:
            await self.request("SET_STATUS", p.U64(0))
        return bases

    async def close(self) -> None:
        """Stops the queues, if the back-end is still there, and gives up connection and memory. May be called twice."""
        if self.connected and self.queues:
            with contextlib.suppress(FrontEndError):
                await self.stop()
        await self.end()
        self._inflight.drop()
        self._fds.close()

    def _lose(self, reason: str) -> None:
        self.queues = ()
        super()._lose(reason)

    # The steps of a start.

    async def _learn_network(self) -> None:
        if ProtocolFeature.CONFIG in self.protocol_features and self.device_id == DeviceType.NET:
            self.config = NetConfig.unpack(await self.read_config(0, len(NetConfig().pack())))
        if self.mtu is not None and ProtocolFeature.MTU in self.protocol_features:
            await self.request("NET_SET_MTU", p.U64(self.mtu))

    async def _share_memory(self) -> None:
        region = p.Region(0, self.memory_size, self.user_base, 0)
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol_features:
            await self.request("ADD_MEM_REG", region, [self.memory_fd])
        else:
            await self.request("SET_MEM_TABLE", p.Regions((region,)), [self.memory_fd])

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
        if self.has_protocol_features:
            for queue in queues:
                await self.enable(queue.index)
        for queue in queues:
            await self.start_ring(queue.size, queue.base, self._addresses(queue), queue.kick_fd)
        await self.add_status(Status.DRIVER_OK)
        await self.request("GET_FEATURES")  # Without REPLY_ACK, the answer says that all before it was carried out.
        self.queues = tuple(queues)

    def _addresses(self, queue: Queue) -> p.VringAddr:
        base = self.user_base
        return p.VringAddr(
            vring=queue.index,
            flags=0,
            descriptor=base + queue.descriptor_addr,
            used=base + queue.device_addr,
            available=base + queue.driver_addr,
            log=0,
        )

    def _own(self, fd: int) -> None:
        self._fds.callback(os.close, fd)

    def _new_event(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._own(fd)
        return fd
