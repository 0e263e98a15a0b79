"""A virtual machine's network card: a virtio-net device behind a vhost-user socket (virtio 1.2, 5.1)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from viaduct.switch.config import ConfigError, PortConfig, VhostUserPort
from viaduct.switch.handover_format import PortData, PortPosition
from viaduct.switch.status import Iommu
from viaduct.switch.status import Peer as PeerStatus
from viaduct.vhost_user.backend import Backend
from viaduct.vhost_user.errors import SocketPathError
from viaduct.vhost_user.handover import Fds
from viaduct.vhost_user.handover import restore as restore_session
from viaduct.vhost_user.handover import save as save_session
from viaduct.vhost_user.ring import PACKED_START
from viaduct.vhost_user.socket_access import SocketAccess, check_mode, group_number, resolve_allow
from viaduct.vhost_user.socket_path import Listener
from viaduct.virtio.features import DeviceType, describe_features

from .net_device import NetDevice
from .port import Port, PortOwner

if TYPE_CHECKING:
    pass


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
    def own_mtu(self) -> int | None:
        """The configured MTU."""
        return self.config.mtu

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
