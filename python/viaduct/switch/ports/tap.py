"""A network interface of the kernel as a port (Documentation/networking/tuntap.rst).

The interface is created unless it exists; one that we created goes away with the port. Frames cross with a virtio-net
header, so the kernel and the guests leave checksums and segmentation to each other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

from viaduct.switch.config import ConfigError, PortConfig, TapPort
from viaduct.switch.handover_format import PortData

from .port import Port, PortOwner
from .retry import Retry

if TYPE_CHECKING:
    from viaduct.vhost_user.handover import Fds

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
TUN_F_USO4, TUN_F_USO6 = 0x20, 0x40

# linux/sockios.h
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
IFF_UP = 1

HEADER = 12

_OFFLOADS = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
_ACCEPTED = ["csum", "tso4", "tso6", "ecn"]


class Tap(Port):
    """A tap interface, with as many queue pairs as it is asked for."""

    config: TapPort

    @property
    def pairs(self) -> int:  # type: ignore[override]  # a constant elsewhere
        """Queue pairs."""
        return self.config.queues

    def __init__(self, owner: PortOwner, name: str, config: PortConfig) -> None:
        super().__init__(owner, name, config)
        self._queues: list[int] = []
        self._accepted: list[str] = []
        self._found = False
        """The interface was there before us: whoever made it will make it again, if he wants to."""
        self._retry = Retry(self._open_again)

    async def _start(self) -> None:
        self._found = _exists(self.config.ifname)
        self._open()

    def _open(self) -> None:
        try:
            for _ in range(self.pairs):
                self._queues.append(self._open_queue())
            self._accepted = self._offer_offloads(self._queues)
            _set_up(self.config.ifname)
            self._attach()
        except OSError as error:
            raise ConfigError(_explain(self.config, error), ("ifname",)) from None

    def _open_again(self) -> None:
        if self._found and not _exists(self.config.ifname):
            raise ConfigError(f"the interface {self.config.ifname!r} is not there", ("ifname",))
        self._close_queues()
        self._open()
        self.broken = None
        self.owner.report("link-up", f"interface {self.config.ifname} is back", self.name)

    def queue_failed(self, index: int, message: str) -> None:
        """The interface was deleted: it is opened again when it comes back."""
        if self.broken is None:
            super().queue_failed(index, message)
        self._retry.start()

    def _attach(self) -> None:
        for pair, queue in enumerate(self._queues):
            self.data_path.attach_tap(self.number, pair, queue, self._accepted)

    async def _stop(self) -> None:
        self._retry.stop()
        self._close_queues()

    def _close_queues(self) -> None:
        while self._queues:
            os.close(self._queues.pop())

    async def freeze(self) -> None:
        self._retry.stop()

    def thaw(self) -> None:
        if self.broken is not None:
            self._retry.start()

    def save(self, fds: Fds) -> PortData:
        taps = [fds.add(queue) for queue in self._queues]
        return PortData(
            name=self.name, broken=self.broken, taps=taps, accepted=self._accepted, interface_found=self._found
        )

    async def _adopt(self, data: PortData, fds: Fds) -> None:
        self._queues = [fds.need(queue) for queue in data.taps]
        self._accepted, self._found = data.accepted, data.interface_found
        if data.broken is None:
            self._attach()

    def _open_queue(self) -> int:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if self.pairs > 1 else 0)
        queue = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(queue, TUNSETIFF, struct.pack("16sH22x", self.config.ifname.encode(), flags))
            fcntl.ioctl(queue, TUNSETVNETHDRSZ, struct.pack("i", HEADER))
        except BaseException:
            os.close(queue)
            raise
        return queue

    def _offer_offloads(self, queues: list[int]) -> list[str]:
        """What the kernel may send us unfinished; it takes all that it knows from us. USO came with Linux 6.2."""
        for offloads, accepted in ((_OFFLOADS | TUN_F_USO4 | TUN_F_USO6, [*_ACCEPTED, "uso"]), (_OFFLOADS, _ACCEPTED)):
            try:
                for queue in queues:
                    fcntl.ioctl(queue, TUNSETOFFLOAD, offloads)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return accepted
        return []

    def _next_try(self) -> float | None:
        return self._retry.next_try

    def _why_down(self) -> str:
        return f"interface {self.config.ifname} is not attached"


def _exists(ifname: str) -> bool:
    import socket

    try:
        socket.if_nametoindex(ifname)
    except OSError:
        return False
    return True


def _set_up(ifname: str) -> None:
    """Switch the interface on, if we may; its owner may have done so already."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        request = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sH22x", ifname.encode(), 0))
        (flags,) = struct.unpack_from("H", request, 16)
        if not flags & IFF_UP:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", ifname.encode(), flags | IFF_UP))


def _explain(config: TapPort, error: OSError) -> str:
    ifname = config.ifname
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return (
                f"not permitted to open the interface {ifname!r}: run as root, or let root make it for this user once: "
                f"ip tuntap add {ifname} mode tap user {os.getuid()} vnet_hdr"
                f"{' multi_queue' if config.queues > 1 else ''} && ip link set {ifname} up"
            )
        case errno.ENOENT | errno.ENXIO | errno.ENODEV:
            return "/dev/net/tun is missing; load the module: modprobe tun"
        case errno.EBUSY:
            return f"the interface {ifname!r} is in use by another process; name another one, or end that process"
        case errno.EINVAL:
            return (
                f"the interface {ifname!r} exists and is not a tap interface with "
                f"{'several queues' if config.queues > 1 else 'one queue'}; name another one"
            )
    return f"the interface {ifname!r} cannot be used: {error.strerror}"
