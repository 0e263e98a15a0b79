"""Tap interfaces of the kernel (Documentation/networking/tuntap.rst): made, opened, told what their user can do."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Collection

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0200, 0x0400
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
TUN_F_USO4, TUN_F_USO6 = 0x20, 0x40

# linux/sockios.h
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
IFF_UP = 1

OFFLOADS = {
    "csum": TUN_F_CSUM,
    "tso4": TUN_F_TSO4,
    "tso6": TUN_F_TSO6,
    "ecn": TUN_F_TSO_ECN,
    "uso": TUN_F_USO4 | TUN_F_USO6,
}
"""What the kernel may leave unfinished in the frames it sends; USO came with Linux 6.2."""


def open_queue(ifname: str, *, multiple: bool = False, header: int | None = 12) -> int:
    """A descriptor of one queue of the interface, which is made unless it exists, and goes away with the last one then.
    Each frame begins with a virtio-net header of `header` bytes; None: without one. `multiple`: it has several queues.
    Raises OSError."""
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if header else 0) | (IFF_MULTI_QUEUE if multiple else 0)
    queue = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(queue, TUNSETIFF, struct.pack("16sH22x", ifname.encode(), flags))
        if header is not None:
            set_header(queue, header)
    except BaseException:
        os.close(queue)
        raise
    return queue


def attach_queue(queue: int, attached: bool) -> None:
    """Lets the kernel send frames by this queue of an interface that has several, or no longer. Raises OSError."""
    flags = IFF_ATTACH_QUEUE if attached else IFF_DETACH_QUEUE
    fcntl.ioctl(queue, TUNSETQUEUE, struct.pack("16sH22x", b"", flags))


def set_header(queue: int, size: int) -> None:
    """Bytes of the virtio-net header before each frame: 10 or 12. Raises OSError."""
    fcntl.ioctl(queue, TUNSETVNETHDRSZ, struct.pack("i", size))


def set_offloads(queue: int, names: Collection[str]) -> None:
    """What the kernel may send unfinished, by the names of `OFFLOADS`. Raises OSError; EINVAL: it knows one not."""
    offloads = 0
    for name in names:
        offloads |= OFFLOADS[name]
    fcntl.ioctl(queue, TUNSETOFFLOAD, offloads)


def exists(ifname: str) -> bool:
    """Whether there is an interface of that name."""
    try:
        socket.if_nametoindex(ifname)
    except OSError:
        return False
    return True


def set_up(ifname: str) -> None:
    """Switch the interface on, if we may; its owner may have done so already. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        request = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sH22x", ifname.encode(), 0))
        (flags,) = struct.unpack_from("H", request, 16)
        if not flags & IFF_UP:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", ifname.encode(), flags | IFF_UP))


def explain(ifname: str, error: OSError, *, multiple: bool = False) -> str:
    """Why the interface cannot be had, and what to do about it."""
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return (
                f"not permitted to open the interface {ifname!r}: run as root, or let root make it for this user once: "
                f"ip tuntap add {ifname} mode tap user {os.getuid()} vnet_hdr"
                f"{' multi_queue' if multiple else ''} && ip link set {ifname} up"
            )
        case errno.ENOENT | errno.ENXIO | errno.ENODEV:
            return "/dev/net/tun is missing; load the module: modprobe tun"
        case errno.EBUSY:
            return f"the interface {ifname!r} is in use by another process; name another one, or end that process"
        case errno.EINVAL:
            return (
                f"the interface {ifname!r} exists and is not a tap interface with "
                f"{'several queues' if multiple else 'one queue'}; name another one"
            )
    return f"the interface {ifname!r} cannot be used: {error.strerror}"
