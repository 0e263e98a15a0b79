"""A virtual machine's network card: a virtio-net device behind a vhost-user socket (virtio 1.2, 5.1)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from viaduct.switch.config import ConfigError, PortConfig, VhostUserPort
from viaduct.switch.handover_format import PortData, PortPosition
from viaduct.switch.status import Iommu
from viaduct.switch.status import Peer as PeerStatus
from viaduct.vhost_user.backend import Backend
from viaduct.vhost_user.device import Peer, Vring
from viaduct.vhost_user.errors import SocketPathError
from viaduct.vhost_user.handover import Fds
from viaduct.vhost_user.handover import restore as restore_session
from viaduct.vhost_user.handover import save as save_session
from viaduct.vhost_user.inflight import InflightDevice
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.vhost_user.ring import PACKED_START
from viaduct.vhost_user.socket_access import SocketAccess, check_mode, group_number, resolve_allow
from viaduct.vhost_user.socket_path import Listener
from viaduct.virtio.features import DeviceFeature, DeviceType, NetFeature, describe_features
from viaduct.virtio.net_config import NetConfig

from .port import Port, PortOwner

if TYPE_CHECKING:
    from viaduct._core import GuestMemory

OFFERED = (
    DeviceFeature.VERSION_1
    | DeviceFeature.ANY_LAYOUT
    | DeviceFeature.INDIRECT_DESC
    | DeviceFeature.EVENT_IDX
    | DeviceFeature.RING_PACKED
    | DeviceFeature.IN_ORDER
    | DeviceFeature.LOG_ALL
    | DeviceFeature.ACCESS_PLATFORM
    | NetFeature.MRG_RXBUF
    | NetFeature.MQ
    | NetFeature.STATUS
    | NetFeature.CSUM
    | NetFeature.HOST_TSO4
    | NetFeature.HOST_TSO6
    | NetFeature.HOST_ECN
    | NetFeature.HOST_USO
    | NetFeature.GUEST_CSUM
    | NetFeature.GUEST_TSO4
    | NetFeature.GUEST_TSO6
    | NetFeature.GUEST_ECN
    | NetFeature.GUEST_USO4
    | NetFeature.GUEST_USO6
)
"""Features of every port; those with an MTU add MTU, those with an address MAC. Legacy drivers, which lack
VERSION_1, are served too."""

_ACCEPTS = {
    "csum": NetFeature.GUEST_CSUM,
    "tso4": NetFeature.GUEST_TSO4,
    "tso6": NetFeature.GUEST_TSO6,
    "ecn": NetFeature.GUEST_ECN,
    "uso": NetFeature.GUEST_USO4 | NetFeature.GUEST_USO6,
}


class VhostUser(Port):
    """A port with a `Backend` whose device is the data path's."""

    config: VhostUserPort

    def __init__(self, owner: PortOwner, name: str, config: VhostUserPort) -> None:
        super().__init__(owner, name, config)
        self.device = NetDevice(self)
        self.backend = Backend(self.device, config.path, client=config.client, name=name)

    @property
    def pairs(self) -> int:  # type: ignore[override]  # a constant elsewhere
        """Queue pairs offered."""
        return self.config.queues

    @property
    def mtu(self) -> int | None:  # type: ignore[override]  # a constant elsewhere
        """The configured MTU, else the one the front-end told."""
        return self.config.mtu or self.device.told_mtu

    async def _start(self) -> None:
        self.backend.access = _access(self.config)
        try:
            await self.backend.start()
        except SocketPathError as error:
            raise ConfigError(str(error), ("path",)) from None

    def change(self, config: PortConfig) -> None:
        """Also the address that is told to the driver, when it reads it next."""
        super().change(config)
        self.device.offer_mac()

    async def _stop(self) -> None:
        await self.backend.close()

    async def freeze(self) -> None:
        await self.backend.freeze()

    def thaw(self) -> None:
        self.backend.thaw()

    def save(self, fds: Fds) -> PortData:
        backend = self.backend
        return PortData(
            name=self.name,
            broken=self.broken,
            listener=fds.put(backend.listener.sock.fileno()) if backend.listener is not None else None,
            session=save_session(backend.session, fds) if backend.session is not None else None,
        )

    async def _adopt(self, data: PortData, fds: Fds) -> None:
        self.backend.access = _access(self.config)
        path, listener, session = self.config.path, None, None
        if data.listener is not None:
            listener = Listener(path, adopted=socket.socket(fileno=fds.need(data.listener)))
        if data.session is not None:
            session = restore_session(data.session, fds, self.device, path, self.name)
        self.backend.adopt(listener, session)

    def resume(self, position: PortPosition) -> None:
        if (session := self.backend.session) is not None:
            self.device.certain = True
            try:
                session.state.resume(position.rings)
            finally:
                self.device.certain = False

    def take_up(self, position: PortPosition) -> None:
        if (session := self.backend.session) is not None:
            # As after a crash: a split ring's used index tells, and so does the whole of a packed one.
            packed = self.device.layout == "packed"
            rings = {index: PACKED_START if packed else base for index, base in position.rings.items()}
            session.state.resume(rings)

    def queue_failed(self, index: int, message: str) -> None:
        """The driver broke its ring, or its memory is gone: the front-end is told, and cut off in the latter case."""
        super().queue_failed(index, message)
        if self.device.memory is not None and self.device.memory.faulted:
            self.backend.disconnect(message)
        else:
            self.backend.fail_queue(index, message)

    def report(self, kind: str, message: str) -> None:
        """Add an event of this port to the switch's history."""
        self.owner.report(kind, message, self.name)

    def link_changed(self) -> None:
        """Report that frames can pass now, or no longer."""
        device = self.device
        if device.is_up:
            self.broken = None
            peer = self.backend.peer
            who = f"pid {peer.pid}" if peer else "front-end"
            self.owner.report("link-up", f"{who}: {device.describe()}", self.name)
        else:
            self.owner.report("link-down", self._why_down(), self.name)

    def _peer(self) -> PeerStatus | None:
        peer = self.backend.peer
        return PeerStatus(pid=peer.pid, uid=peer.uid) if peer else None

    def _ring(self) -> str | None:
        return self.device.layout if self.device.is_up else None

    def _features(self) -> tuple[str, ...]:
        if not self.device.is_up:
            return ()
        return tuple(describe_features(self.device.negotiated, DeviceType.NET).split(", "))

    def _iommu(self) -> Iommu | None:
        counts = self.backend.iommu_counts
        return Iommu(*counts) if counts is not None else None

    def _next_try(self) -> float | None:
        return self.backend.next_try

    def _why_down(self) -> str:
        path = self.config.path
        if self.backend.peer is None:
            how = f"connecting to {path}" if self.config.client else f"waiting for a front-end on {path}"
            reasons = [reason for reason in (self.device.last_reason, self.backend.unreachable) if reason]
            return f"{how} ({'; '.join(reasons)})" if reasons else how
        return "connected; the guest's driver has not started its queues"


def _access(config: VhostUserPort) -> SocketAccess:
    """Who may connect. Raises ConfigError for a user or group that this host does not have."""
    try:
        gid = None if config.group is None else group_number(config.group)
    except ValueError as error:
        raise ConfigError(str(error), ("group",)) from None
    try:
        allow = () if config.allow is None else resolve_allow(config.allow)
    except ValueError as error:
        raise ConfigError(str(error), ("allow",)) from None
    return SocketAccess(mode=None if config.mode is None else check_mode(config.mode), gid=gid, allow=allow)


class NetDevice(InflightDevice):
    """Tells the data path what the front-end decides."""

    device_id = int(DeviceType.NET)

    def __init__(self, port: VhostUser) -> None:
        super().__init__()
        self.port = port
        mtu = port.config.mtu
        self.features = int(OFFERED | (NetFeature.MTU if mtu else 0))
        self.protocol_features = (
            ProtocolFeature.MQ
            | ProtocolFeature.REPLY_ACK
            | ProtocolFeature.BACKEND_REQ
            | ProtocolFeature.MTU
            | ProtocolFeature.RARP
            | ProtocolFeature.LOG_SHMFD
            | ProtocolFeature.STATUS
            | ProtocolFeature.RESET_DEVICE
            | ProtocolFeature.CONFIG
            | ProtocolFeature.CONFIGURE_MEM_SLOTS
            | ProtocolFeature.INFLIGHT_SHMFD
        )
        self.queue_count = 2 * port.config.queues
        self.net_config = NetConfig(max_queue_pairs=port.config.queues, mtu=mtu or 1500)
        self.offer_mac()
        self.memory: GuestMemory | None = None
        self.told_mtu: int | None = None
        self.last_reason = ""
        self.certain = False
        """Rings start where another process of ours has stopped."""
        self._enabled: set[int] = set()
        self._was_up = False

    @property
    def is_up(self) -> bool:
        """Frames can be delivered: a receive queue runs."""
        return any(index % 2 == 0 for index in self._enabled)

    @property
    def layout(self) -> str:
        """Of the virtqueues: split or packed (virtio 1.2, 2.6)."""
        return "packed" if self.packed else "split"

    def offer_mac(self) -> None:
        """Tell the driver the port's address, if it has one (virtio 1.2, 5.1.5). A feature that drivers may have seen
        is not taken back."""
        if macs := self.port.config.own_macs:
            self.features |= NetFeature.MAC
            self.net_config = self.net_config._replace(mac=macs[0])

    def describe(self) -> str:
        """The link in a few words."""
        pairs = len([index for index in self._enabled if index % 2 == 0])
        mergeable = "mergeable" if self.negotiated & NetFeature.MRG_RXBUF else "non-mergeable"
        return f"{pairs} queue pair{'s' if pairs > 1 else ''}, {self.layout} rings, {mergeable} buffers"

    def save(self, fds: Fds) -> dict[str, Any]:
        return {**super().save(fds), "told_mtu": self.told_mtu, "up": self._was_up}

    def restore(self, data: dict[str, Any], fds: Fds) -> None:
        super().restore(data, fds)
        self.told_mtu = data.get("told_mtu")
        self._was_up = bool(data.get("up", False))  # nothing new to report
        self.port.change(self.port.config)

    def connected(self, peer: Peer) -> None:
        self.last_reason = ""
        self.port.report("peer-connected", f"pid {peer.pid}, uid {peer.uid}, on {peer.path}")

    def peer_refused(self, peer: Peer, reason: str) -> None:
        self.port.report("peer-refused", reason)

    def request_failed(self, text: str) -> None:
        self.port.report("request-refused", text)

    def disconnected(self, reason: str) -> None:
        self.last_reason = reason
        self.port.report("peer-disconnected", reason)
        self.memory = None
        self.negotiated = 0
        self.forget_inflight()
        self._enabled.clear()
        self._report_link()

    def set_features(self, features: int) -> None:
        self.negotiated = features
        accepts = [name for name, bits in _ACCEPTS.items() if features & bits == bits]
        self.port.data_path.set_accepted(self.port.number, accepts)

    def set_memory(self, memory: GuestMemory) -> None:
        self.port.data_path.set_memory(self.port.number, memory)
        self.memory = memory

    def translations_changed(self) -> None:
        self.port.data_path.translations_changed(self.port.number)

    def translations_removed(self, first: int, last: int) -> None:
        self.port.data_path.translations_removed(self.port.number, first, last)

    def start_queue(self, vring: Vring) -> None:
        features = self.negotiated
        assert self.memory is not None  # the back-end starts no ring before it has memory
        self.port.data_path.start_queue(
            self.port.number,
            vring.index,
            self.memory,
            layout=self.layout,
            size=vring.size,
            descriptor_addr=vring.descriptor_addr,
            driver_addr=vring.driver_addr,
            device_addr=vring.device_addr,
            base=vring.base,
            event_idx=bool(features & DeviceFeature.EVENT_IDX),
            indirect=bool(features & DeviceFeature.INDIRECT_DESC),
            in_order=bool(features & DeviceFeature.IN_ORDER),
            mergeable=bool(features & NetFeature.MRG_RXBUF),
            header_len=12 if features & (DeviceFeature.VERSION_1 | NetFeature.MRG_RXBUF) else 10,
            kick_fd=vring.kick_fd,
            call_fd=vring.call_fd,
            log_addr=vring.log_addr,
            inflight=self.inflight_region(vring.index),
            certain=self.certain,
        )

    def stop_queue(self, index: int) -> int:
        base = self.port.data_path.stop_queue(self.port.number, index)
        self._enabled.discard(index)
        self._report_link()
        return base or 0

    def enable_queue(self, index: int, enabled: bool) -> None:
        self.port.data_path.enable_queue(self.port.number, index, enabled)
        (self._enabled.add if enabled else self._enabled.discard)(index)
        self._report_link()

    def set_call(self, index: int, fd: int | None) -> None:
        self.port.data_path.set_call(self.port.number, index, fd)

    def set_log_addr(self, index: int, addr: int | None) -> None:
        self.port.data_path.set_log_addr(self.port.number, index, addr)

    def read_config(self, offset: int, size: int) -> bytes:
        space = self.net_config.pack().ljust(256, b"\0")
        return space[offset : offset + size]

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        raise ValueError("the driver may write no field of a network device's configuration (virtio 1.2, 5.1.4)")

    def reset(self) -> None:
        super().reset()
        self.negotiated = 0

    def set_mtu(self, mtu: int) -> None:
        configured = self.port.config.mtu
        if configured is not None and mtu > configured:
            raise ValueError(
                f"MTU {mtu} is more than the {configured} of port {self.port.name}; "
                f"start the guest with host_mtu={configured}, or give the port mtu={mtu}"
            )
        self.told_mtu = mtu
        self.port.change(self.port.config)

    def send_rarp(self, mac: bytes) -> None:
        self.port.data_path.announce(self.port.number, rarp_request(mac))

    def _report_link(self) -> None:
        if self.is_up != self._was_up:
            self._was_up = self.is_up
            if not self._was_up:
                self.port.data_path.forget_stations(self.port.number)
            self.port.link_changed()


def rarp_request(mac: bytes) -> bytes:
    """A broadcast by which bridges learn where the station is now (RFC 903; vhost-user, VHOST_USER_SEND_RARP)."""
    header = b"\xff" * 6 + mac + b"\x80\x35"
    request = b"\x00\x01\x08\x00\x06\x04\x00\x03" + mac + bytes(4) + mac + bytes(4)
    return (header + request).ljust(60, b"\0")
