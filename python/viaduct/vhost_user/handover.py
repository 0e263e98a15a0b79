"""A connection as data: for the process that takes over a running back-end.

`save` describes a frozen connection (`Backend.freeze`), and `restore` makes the same one in another process. File
descriptors travel beside the data (unix(7), SCM_RIGHTS), which names them by their place in a list. Nothing here
touches a ring: `BackendState.resume` starts them, when the process that served them has let go of them.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import msgspec

from viaduct.vhost_user.back_channel import BackChannel
from viaduct.vhost_user.backend_state import BackendState
from viaduct.vhost_user.device import Device, Peer
from viaduct.vhost_user.dirty_log import DirtyLog
from viaduct.vhost_user.memory_table import MemoryTable
from viaduct.vhost_user.payloads import Region, VringAddr
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.vhost_user.ring import Ring
from viaduct.vhost_user.session import Session
from viaduct.vhost_user.wire import Channel
from viaduct.virtio.features import DeviceFeature


class Fds:
    """The file descriptors that go with a piece of data. The sender's are borrowed; the receiver's are owned."""

    def __init__(self, fds: list[int] | None = None) -> None:
        self.fds = fds if fds is not None else []

    def put(self, fd: int | None) -> int | None:
        """The place of `fd`, which stays the caller's; None for None."""
        return None if fd is None else self.add(fd)

    def add(self, fd: int) -> int:
        """The place of `fd`, which stays the caller's."""
        self.fds.append(fd)
        return len(self.fds) - 1

    def take(self, place: int | None) -> int | None:
        """The descriptor there, which is the caller's from now on. Raises `ValueError` if there is none."""
        if place is None:
            return None
        if not 0 <= place < len(self.fds) or self.fds[place] < 0:
            raise ValueError(f"there is no file descriptor number {place} among {len(self.fds)}, or it was taken twice")
        fd, self.fds[place] = self.fds[place], -1
        return fd

    def need(self, place: int | None) -> int:
        """The same, for one that must be there."""
        fd = self.take(place)
        if fd is None:
            raise ValueError("a file descriptor is missing")
        return fd

    def close(self) -> None:
        """Closes what was received and not taken."""
        while self.fds:
            fd = self.fds.pop()
            if fd >= 0:
                os.close(fd)


class RegionData(msgspec.Struct, frozen=True):
    """A region of the front-end's memory."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    fd: int
    repeats: int = 0


class RingData(msgspec.Struct, frozen=True):
    """A virtqueue, see `viaduct.vhost_user.ring.Ring`. `base` is that of the last start: where it stands now is said
    when the old process has stopped."""

    size: int | None
    addr: tuple[int, ...] | None
    base: int | None
    kicked: bool
    kick_fd: int | None
    call_fd: int | None
    err_fd: int | None
    started: bool
    enabled: bool
    failure: str | None


class LogData(msgspec.Struct, frozen=True):
    """The log of written pages, while a migration runs."""

    fd: int
    size: int
    offset: int


class SessionData(msgspec.Struct, frozen=True, kw_only=True):
    """A connection. `data` and `fds` belong to a message that has arrived in part. `device` is the device's own.

    `unsent`, `received` and `expected` belong to the back-end channel, whose socket is `request_socket`: bytes of
    messages in part, and the requests that have still to be answered. `translations`: what the IOMMU has said, as
    address, size, user address and permissions.
    """

    sock: int
    pid: int
    uid: int
    data: bytes
    fds: list[int]
    features: int | None
    protocol_features: int
    owned: bool
    regions: list[RegionData]
    rings: list[RingData]
    request_socket: int | None
    device: dict[str, Any]
    log: LogData | None = None
    log_event: int | None = None
    unsent: bytes = b""
    received: bytes = b""
    expected: list[int] = []
    translations: list[tuple[int, int, int, int]] = []


def save(session: Session, fds: Fds) -> SessionData:
    """Describes a frozen connection; its descriptors are put into `fds`."""
    state, channel = session.state, session.channel
    back_channel = state.back_channel
    return SessionData(
        sock=fds.add(channel.sock.fileno()),
        pid=session.peer.pid,
        uid=session.peer.uid,
        data=channel.data,
        fds=[fds.add(fd) for fd in channel.fds.peek()],
        features=state.features,
        protocol_features=int(state.protocol_features),
        owned=state.owned,
        regions=[
            RegionData(*region, fds.add(state.table.file_of(region).fd), state.table.repeats_of(region))
            for region in state.table.regions
        ],
        rings=[_save_ring(ring, fds) for ring in state.rings],
        request_socket=fds.put(back_channel.fileno()) if back_channel is not None else None,
        device=state.device.save(fds),
        log=None if state.log is None else LogData(fds.add(state.log.fd), state.log.size, state.log.offset),
        log_event=fds.put(state.log_event),
        unsent=back_channel.unsent if back_channel is not None else b"",
        received=back_channel.received if back_channel is not None else b"",
        expected=back_channel.expected if back_channel is not None else [],
        translations=state.iommu.table.translations if state.iommu is not None else [],
    )


def _save_ring(ring: Ring, fds: Fds) -> RingData:
    return RingData(
        ring.size,
        None if ring.addr is None else tuple(ring.addr),
        ring.base,
        ring.kicked,
        fds.put(ring.kick_fd),
        fds.put(ring.call_fd),
        fds.put(ring.err_fd),
        ring.started,
        ring.enabled,
        ring.failure,
    )


def restore(data: SessionData, fds: Fds, device: Device, path: str, name: str) -> Session:
    """Makes the connection again, frozen: memory mapped, no ring running. Takes its descriptors out of `fds`.

    Raises `ValueError` or `VhostUserError` for data that cannot be, and `OSError` if this process may not map or open
    so much.
    """
    channel = Channel(socket.socket(fileno=fds.need(data.sock)))
    channel.data = data.data
    channel.fds.extend(fds.need(place) for place in data.fds)
    session = Session(channel, device, Peer(pid=data.pid, uid=data.uid, path=path), name)
    session.hold()
    try:
        _restore_state(session.state, data, fds)
    except BaseException:
        session.abandon()
        raise
    return session


def _restore_state(state: BackendState, data: SessionData, fds: Fds) -> None:
    if len(data.rings) != len(state.rings):
        raise ValueError(f"{len(data.rings)} rings; this port has {len(state.rings)}")
    state.owned = data.owned
    state.protocol_features = ProtocolFeature(data.protocol_features)
    for ring, saved in zip(state.rings, data.rings, strict=True):
        ring.size, ring.base = saved.size, saved.base
        ring.addr = None if saved.addr is None else VringAddr(*saved.addr)
        ring.kicked, ring.kick_fd = saved.kicked, fds.take(saved.kick_fd)
        ring.call_fd, ring.err_fd = fds.take(saved.call_fd), fds.take(saved.err_fd)
        ring.started, ring.enabled, ring.failure = saved.started, saved.enabled, saved.failure
    if data.request_socket is not None:
        fd = fds.need(data.request_socket)
        try:
            state.back_channel = BackChannel(fd)
        finally:
            os.close(fd)
        state.back_channel.adopt(data.unsent, data.received, data.expected)
    table = MemoryTable()
    for saved_region in data.regions:
        region = Region(*msgspec.structs.astuple(saved_region)[:4])
        fd = fds.need(saved_region.fd)
        try:
            table = table.with_region(region, fd)
            for _ in range(saved_region.repeats):
                table = table.with_region_again(region, fd) or table
        finally:
            os.close(fd)
    state.features, state.table = data.features, table
    state.log_event = fds.take(data.log_event)
    if data.log is not None:
        fd = fds.need(data.log.fd)
        try:
            state.log = DirtyLog(fd, data.log.size, data.log.offset, state.log_event)
        finally:
            os.close(fd)
    if (data.features or 0) & DeviceFeature.ACCESS_PLATFORM:
        state.make_iommu(data.translations)
    state.pause()
    state.device.restore(data.device, fds)
    if data.features is not None:
        state.device.set_features(data.features & ~DeviceFeature.PROTOCOL_FEATURES)
    state.device.set_memory(state.memory_in_force())
