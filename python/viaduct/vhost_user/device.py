"""A virtio device as its back-end sees it.

A `Device` is told what the front-end decided: features, memory, rings. Its transport (`viaduct.vhost_user.Backend`, or
the virtio transport of our own VMM) checks every message before it gets here, so the values are in range, the rings lie
in the memory, and a queue is started before it is enabled, enabled only while it is started, and stopped before the
connection ends.

All methods are called on the thread of the asyncio loop. An exception raised by one of them is that message's failure:
the front-end gets a nack if it asked for an answer, else the connection is closed with the exception's text as reason.
Nothing else is disturbed. Who only wants to answer requests in Python subclasses
`viaduct.vhost_user.QueueDevice` instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.virtio.features import DeviceFeature, DeviceType

if TYPE_CHECKING:
    from viaduct._core import GuestMemory
    from viaduct.vhost_user.handover import Fds


class Peer(msgspec.Struct, frozen=True):
    """Who is at the other end of the socket."""

    pid: int
    """Process that connected (or that listens); 0 if it lives in a PID namespace we cannot see."""
    uid: int
    path: str
    """The socket's path."""
    gid: int = -1
    """Primary group; -1 if nobody knows."""

    def __str__(self) -> str:
        return f"{self.path}, peer pid {self.pid or 'unknown'}"


class Vring(msgspec.Struct, frozen=True):
    """Everything needed to start a virtqueue. Addresses are front-end-virtual, as SET_VRING_ADDR gives them; I/O
    virtual with ACCESS_PLATFORM.

    The file descriptors belong to the back-end and live until the queue stops; a device that hands one to another
    thread duplicates it.
    """

    index: int
    size: int
    """Number of descriptors: a power of two up to 32768 for a split ring, 1 to 32768 for a packed one."""
    descriptor_addr: int
    driver_addr: int
    """Available ring, or driver event suppression structure."""
    device_addr: int
    """Used ring, or device event suppression structure."""
    base: int
    """Where to go on. Split: index in the available ring. Packed: bits 0-14 and 15 the available index and its wrap
    counter, bits 16-30 and 31 those of the used index (vhost-user, "Vring descriptor indices for packed
    virtqueues")."""
    kick_fd: int | None
    """None: the driver does not notify, the queue has to be polled."""
    call_fd: int | None
    """None: the driver polls and wants no notification."""
    err_fd: int | None
    log_addr: int | None = None
    """Where writes to the device part are logged while the memory has a log; None: they are not."""


class Inflight(msgspec.Struct, frozen=True):
    """The shared buffer that tracks requests in flight (vhost-user, "Inflight description")."""

    fd: int
    mmap_size: int
    mmap_offset: int
    queue_count: int
    queue_size: int


class Transport(Protocol):
    """What carries a device to its driver, as the device sees it. A transport puts itself into `Device.transport`
    before the first call; the device calls it on the thread of the loop."""

    def config_changed(self) -> bool:
        """Tells the driver that the configuration space has changed (virtio 1.2, 2.3 and 2.5). Returns whether it could
        be told."""

    def fail_queue(self, index: int, error: str) -> None:
        """The driver broke the running queue `index`, or the device could not go on with it: it stays silent until the
        driver resets it. `error` says what was found, what is allowed and the section."""

    def disconnect(self, reason: str) -> None:
        """The memory cannot be used any more (its file was truncated): ends everything that was agreed on."""


class Device:
    """Base class of devices; see the module's text for the order of calls.

    Class or instance attributes say what the device is; the methods below do nothing useful unless overridden.
    """

    device_id: int = 0
    """Virtio device number (`viaduct.virtio.DeviceType`)."""
    features: int = int(DeviceFeature.VERSION_1)
    """Feature bits offered; the back-end adds VHOST_USER_F_PROTOCOL_FEATURES."""
    protocol_features: ProtocolFeature = (
        ProtocolFeature.MQ
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.RESET_DEVICE
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.STATUS
    )
    """Protocol features that this device really supports; those the back-end does not implement are left out."""
    queue_count: int = 1
    """Number of virtqueues."""
    queue_size: int = 256
    """Most descriptors of each queue in a machine of ours; a vhost-user front-end decides that itself."""
    config_size: int = 0
    """Bytes of configuration space that `read_config` knows, all of which a machine of ours shows to its driver."""
    transport: Transport | None = None
    """What carries this device; set by it."""

    _status = 0

    def config_changed(self) -> bool:
        """Tells the driver that the configuration space has changed. Returns whether it could be told: not without a
        driver, and over vhost-user only where the front-end listens."""
        return self.transport is not None and self.transport.config_changed()

    @property
    def reported_queue_count(self) -> int:
        """The answer to GET_QUEUE_NUM. Network front-ends (QEMU, DPDK) compare it with their number of queue
        *pairs*."""
        return self.queue_count // 2 if self.device_id == DeviceType.NET else self.queue_count

    def connected(self, peer: Peer) -> None:
        """A front-end has come."""

    def disconnected(self, reason: str) -> None:
        """The front-end has gone; its queues are stopped already. The device lets go of the memory."""

    def peer_refused(self, peer: Peer, reason: str) -> None:
        """Somebody connected and was sent away, for `reason`; whoever is being served does not notice."""

    def request_failed(self, text: str) -> None:
        """A request was refused or ended the connection; `text` is what the log says about it."""

    def save(self, fds: Fds) -> dict[str, Any]:
        """What another process has to know to go on with the front-end that is connected: plain data, and descriptors
        put into `fds`. Raises `VhostUserError` if this is no time to change the process."""
        return {"status": self._status}

    def restore(self, data: dict[str, Any], fds: Fds) -> None:
        """Takes over what another process saved; features and memory follow, queues start later. What an older
        version did not save is as in a new device."""
        self._status = int(data.get("status", 0))

    def close(self) -> None:
        """Nobody needs the device any more: it lets go of what it holds outside of the guest. Twice does no harm."""

    def set_features(self, features: int) -> None:
        """The driver and the front-end acknowledged `features`, a subset of those offered."""

    def set_memory(self, memory: GuestMemory) -> None:
        """A new immutable memory table; queues may be running and lie in it. During a migration it has a log of written
        pages."""

    def translations_changed(self) -> None:
        """The IOMMU has answered: queues that wait for a translation look again. Only with ACCESS_PLATFORM."""

    def translations_removed(self, first: int, last: int) -> None:
        """I/O virtual addresses from `first` to `last` stand for something else now, or for nothing: when this returns,
        nobody uses what they stood for. Only with ACCESS_PLATFORM."""

    def start_queue(self, vring: Vring) -> None:
        """The queue starts, disabled: `enable_queue` follows at once if it is enabled (vhost-user, "Ring states").

        With ACCESS_PLATFORM it may raise `viaduct._core.TranslationMissing`; then it is tried again when translations
        have come."""

    async def drain_queue(self, index: int) -> None:
        """The front-end is about to stop this started queue: take no more requests and finish those in flight. Awaited
        before `stop_queue` for GET_VRING_BASE and RESET_DEVICE, not when the front-end has gone."""

    def stop_queue(self, index: int) -> int:
        """The queue stops. Returns where it stands, as in `Vring.base`; not to be touched after that."""
        return 0

    def enable_queue(self, index: int, enabled: bool) -> None:
        """A started queue is enabled or disabled. Disabled: take requests, without any side effect."""

    def set_call(self, index: int, fd: int | None) -> None:
        """The call descriptor of a started queue was replaced; the old one is closed after this returns."""

    def set_err(self, index: int, fd: int | None) -> None:
        """The error descriptor of a started queue was replaced. `Backend.fail_queue` uses it by itself."""

    def read_config(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of the configuration space (protocol feature CONFIG)."""
        raise NotImplementedError(f"{type(self).__name__} has no configuration space")

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        """Writes configuration space; read-only fields must be refused (raise) unless `flags` is 1, live migration."""
        raise NotImplementedError(f"{type(self).__name__} has no writable configuration space")

    def set_status(self, status: int) -> None:
        """The driver's status field (virtio 1.2, 2.1; protocol feature STATUS). Queues are stopped by GET_VRING_BASE,
        not by this: QEMU sends status 0 first and then asks where the queues stand."""
        self._status = status

    def get_status(self) -> int:
        """The status field as the device sees it."""
        return self._status

    def reset(self) -> None:
        """RESET_DEVICE: back to the initial state. The queues are stopped already; the memory stays."""
        self._status = 0

    def set_mtu(self, mtu: int) -> None:
        """Host MTU in bytes, 68 to 65535 (protocol feature MTU). Raise if it cannot be had."""
        raise NotImplementedError(f"{type(self).__name__} has no MTU")

    def send_rarp(self, mac: bytes) -> None:
        """Announce the guest with this address after a migration (protocol feature RARP)."""
        raise NotImplementedError(f"{type(self).__name__} cannot announce a guest")

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[int, int, int]:
        """A new zeroed buffer for requests in flight: file descriptor (the back-end closes it), mmap size, mmap offset
        (protocol feature INFLIGHT_SHMFD)."""
        raise NotImplementedError(f"{type(self).__name__} does not track requests in flight")

    def set_inflight(self, inflight: Inflight) -> None:
        """The buffer of a session before this one. The descriptor is closed after this returns: map or duplicate it."""
        raise NotImplementedError(f"{type(self).__name__} does not track requests in flight")

    def set_log_addr(self, index: int, addr: int | None) -> None:
        """Where writes to the device part of a started queue are logged, see `Vring.log_addr` (protocol feature
        LOG_SHMFD and virtio feature LOG_ALL). The log itself comes with the memory, in `set_memory`."""
