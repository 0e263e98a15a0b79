"""A virtio-net device (virtio 1.2, 5.1) whose queues are the data path's: what a port shows to a guest's driver.

The driver's decisions come from a front-end behind a socket, or from a machine in this process; this tells the data
path what they mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from viaduct.switch.config import PortConfig
from viaduct.vhost_user.device import Peer, Vring
from viaduct.vhost_user.handover import Fds
from viaduct.vhost_user.inflight import InflightDevice
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.virtio.features import DeviceFeature, DeviceType, NetFeature
from viaduct.virtio.net_config import NetConfig

if TYPE_CHECKING:
    from viaduct._core import GuestMemory
    from viaduct._core import Switch as DataPath

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


class NetPort(Protocol):
    """What the device needs of its port."""

    name: str
    number: int

    @property
    def config(self) -> PortConfig: ...

    @property
    def data_path(self) -> DataPath: ...

    @property
    def pairs(self) -> int: ...

    @property
    def own_mtu(self) -> int | None:
        """The MTU that the port was given."""

    def report(self, kind: str, message: str) -> None: ...

    def change(self, config: PortConfig) -> None: ...

    def link_changed(self) -> None: ...


class NetDevice(InflightDevice):
    """Tells the data path what the front-end decides."""

    device_id = int(DeviceType.NET)
    config_size = len(NetConfig().pack())

    def __init__(self, port: NetPort) -> None:
        super().__init__()
        self.port = port
        mtu = port.own_mtu
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
        self.queue_count = 2 * port.pairs
        self.net_config = NetConfig(max_queue_pairs=port.pairs, mtu=mtu or 1500)
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
        configured = self.port.own_mtu
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
