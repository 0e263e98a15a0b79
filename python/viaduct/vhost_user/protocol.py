"""The vhost-user protocol as one table.

`FRONT_END_REQUESTS` and `BACK_END_REQUESTS` say of each request what it carries, how many file descriptors come with
it, what is answered, which feature it needs and in which state it is legal. The session dispatches and validates by
the table, ``docs/vhost-user.md`` is generated from it, and the fuzz corpus is drawn from it, so the four cannot
disagree.

The document is QEMU's ``docs/interop/vhost-user.rst``; sections are cited by their titles, since it has no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntFlag
from typing import Any, NamedTuple

from viaduct.vhost_user import payloads as p
from viaduct.virtio.features import DeviceFeature, DeviceType

VERSION = 1
"""Lower two bits of the header's flags (vhost-user, "Header")."""
REPLY = 1 << 2
"""Header flag: this is a reply."""
NEED_REPLY = 1 << 3
"""Header flag: the sender wants to know how it went (vhost-user, "VHOST_USER_PROTOCOL_F_REPLY_ACK")."""
MAX_MEM_SLOTS = 509
"""What GET_MAX_MEM_SLOTS answers: the number QEMU's own vhost uses for x86."""


class ProtocolFeature(IntFlag):
    """vhost-user, "Protocol features"."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    SHMEM = 1 << 20

    def __invert__(self) -> int:  # type: ignore[override]
        """All other bits of an integer, those without a name included: Python's own differs from release to release."""
        return ~int(self)


F = ProtocolFeature

IMPLEMENTED = (
    F.MQ
    | F.LOG_SHMFD
    | F.RARP
    | F.REPLY_ACK
    | F.MTU
    | F.BACKEND_REQ
    | F.CONFIG
    | F.INFLIGHT_SHMFD
    | F.RESET_DEVICE
    | F.CONFIGURE_MEM_SLOTS
    | F.STATUS
)
"""Protocol features whose messages the back-end carries out. It offers those that its device supports too."""


class Legal(Enum):
    """When a request may come; the value is what an error and the documentation say."""

    ALWAYS = "always"
    ONCE = "once in a connection"
    RING_STOPPED = "while the ring is stopped"
    RING_STOPPED_OR_SAME = "while the ring is stopped, or with the place it has and another log"
    RINGS_STOPPED_OR_SAME = "while all rings are stopped, or with the value in force"
    RINGS_STOPPED = "while all rings are stopped"


class Fds(NamedTuple):
    """How many file descriptors a message carries; `exact`, if given, knows the number from the payload."""

    minimum: int
    maximum: int
    text: str
    exact: Callable[[Any], int] | None = None

    def check(self, payload: Any, found: int) -> str | None:
        """None if `found` descriptors are right for this message, else what is allowed."""
        if self.exact is not None:
            wanted = self.exact(payload)
            return None if found == wanted else f"{wanted} ({self.text})"
        return None if self.minimum <= found <= self.maximum else self.text

    def __str__(self) -> str:
        return self.text


NO_FDS = Fds(0, 0, "none")
ONE_FD = Fds(1, 1, "1")
UP_TO_ONE_FD = Fds(0, 1, "0, or 1 that is closed unused")
FD_UNLESS_FLAG = Fds(0, 1, "1, or none if bit 8 is set", lambda payload: 0 if payload.no_fd else 1)
FD_PER_REGION = Fds(0, p.MAX_REGIONS, "1 for each region", lambda payload: len(payload.regions))
LOG_FDS = Fds(0, 1, "1 with LOG_SHMFD, else none", lambda payload: 1 if payload.size else 0)


class Gate(NamedTuple):
    """What must be negotiated before a request is legal."""

    protocol: ProtocolFeature = ProtocolFeature(0)
    """A protocol feature in SET_PROTOCOL_FEATURES."""
    offered: ProtocolFeature = ProtocolFeature(0)
    """A protocol feature that only has to be in the answer to GET_PROTOCOL_FEATURES."""
    virtio: DeviceFeature = DeviceFeature(0)
    """A virtio feature in SET_FEATURES."""
    device: DeviceType | None = None
    """The device must be of this type."""

    def __str__(self) -> str:
        if self.device is not None:
            return f"device {self.device.name}"
        return str((self.protocol or self.offered or self.virtio).name or "none")


NO_GATE = Gate()


class Request(NamedTuple):
    """One row of the table."""

    number: int
    name: str
    payload: p.Layout = p.EMPTY
    fds: Fds = NO_FDS
    reply: p.Layout | None = None
    """Payload of the answer that is always due; None: only an acknowledgement, if REPLY_ACK and need_reply ask for
    it."""
    reply_fd: bool = False
    """The answer may carry a file descriptor."""
    gate: Gate = NO_GATE
    legal: Legal = Legal.ALWAYS
    refusal: bytes | None = None
    """The answer's payload that means "no", for requests whose answer can say so."""
    see: str = ""
    """Section beside the request's own that rules it."""

    @property
    def section(self) -> str:
        """Where the document says so."""
        return f'vhost-user, "VHOST_USER_{self.name}"' + (f' and "{self.see}"' if self.see else "")

    @property
    def handler(self) -> str:
        """Name of the method that carries it out."""
        return self.name.lower()


def _u64(value: int) -> bytes:
    return p.U64_PAYLOAD.pack((value,))


NACK = _u64(1)
"""Payload of a negative acknowledgement; zero is a positive one."""
ACK = _u64(0)

_SUSPENDED = "Suspended device state"
_RINGS = "Ring states"

FRONT_END_REQUESTS: dict[int, Request] = {
    request.number: request
    for request in (
        Request(1, "GET_FEATURES", reply=p.U64_PAYLOAD),
        Request(2, "SET_FEATURES", p.U64_PAYLOAD, legal=Legal.RINGS_STOPPED_OR_SAME, see=_RINGS),
        Request(3, "SET_OWNER", legal=Legal.ONCE),
        Request(4, "RESET_OWNER"),
        Request(5, "SET_MEM_TABLE", p.REGIONS, FD_PER_REGION, see="Memory access"),
        Request(
            6, "SET_LOG_BASE", p.LOG_BASE, LOG_FDS, reply=p.EMPTY, gate=Gate(protocol=F.LOG_SHMFD), see="Migration"
        ),
        Request(7, "SET_LOG_FD", p.LOG_FD, ONE_FD, gate=Gate(protocol=F.LOG_SHMFD), see="Migration"),
        Request(8, "SET_VRING_NUM", p.VRING_STATE, legal=Legal.RING_STOPPED),
        Request(9, "SET_VRING_ADDR", p.VRING_ADDR, legal=Legal.RING_STOPPED_OR_SAME),
        Request(10, "SET_VRING_BASE", p.VRING_INDICES, legal=Legal.RING_STOPPED),
        Request(11, "GET_VRING_BASE", p.VRING_STATE, reply=p.VRING_INDICES, see=_RINGS),
        Request(12, "SET_VRING_KICK", p.VRING_FD, FD_UNLESS_FLAG, see=_RINGS),
        Request(13, "SET_VRING_CALL", p.VRING_FD, FD_UNLESS_FLAG),
        Request(14, "SET_VRING_ERR", p.VRING_FD, FD_UNLESS_FLAG),
        Request(15, "GET_PROTOCOL_FEATURES", reply=p.U64_PAYLOAD),
        Request(16, "SET_PROTOCOL_FEATURES", p.U64_PAYLOAD, legal=Legal.RINGS_STOPPED_OR_SAME),
        Request(17, "GET_QUEUE_NUM", reply=p.U64_PAYLOAD, gate=Gate(offered=F.MQ), see="Multiple queue support"),
        Request(18, "SET_VRING_ENABLE", p.VRING_STATE, see=_RINGS),
        Request(19, "SEND_RARP", p.U64_PAYLOAD, gate=Gate(offered=F.RARP)),
        Request(20, "NET_SET_MTU", p.U64_PAYLOAD, gate=Gate(offered=F.MTU)),
        Request(21, "SET_BACKEND_REQ_FD", fds=ONE_FD, gate=Gate(protocol=F.BACKEND_REQ), see="Back-end communication"),
        Request(
            22,
            "IOTLB_MSG",
            p.IOTLB,
            reply=p.U64_PAYLOAD,
            gate=Gate(virtio=DeviceFeature.ACCESS_PLATFORM),
            refusal=NACK,
            see="IOMMU support",
        ),
        Request(23, "SET_VRING_ENDIAN", p.VRING_STATE, gate=Gate(protocol=F.CROSS_ENDIAN), legal=Legal.RING_STOPPED),
        Request(24, "GET_CONFIG", p.CONFIG, reply=p.CONFIG, gate=Gate(protocol=F.CONFIG), refusal=b""),
        Request(25, "SET_CONFIG", p.CONFIG, gate=Gate(protocol=F.CONFIG)),
        Request(
            26,
            "CREATE_CRYPTO_SESSION",
            p.CRYPTO_SESSION,
            reply=p.CRYPTO_SESSION,
            gate=Gate(protocol=F.CRYPTO_SESSION),
        ),
        Request(27, "CLOSE_CRYPTO_SESSION", p.U64_PAYLOAD, gate=Gate(protocol=F.CRYPTO_SESSION)),
        Request(28, "POSTCOPY_ADVISE", reply=p.EMPTY, reply_fd=True, gate=Gate(protocol=F.PAGEFAULT), see="Migration"),
        Request(29, "POSTCOPY_LISTEN", gate=Gate(protocol=F.PAGEFAULT), see="Migration"),
        Request(
            30, "POSTCOPY_END", reply=p.U64_PAYLOAD, gate=Gate(protocol=F.PAGEFAULT), refusal=NACK, see="Migration"
        ),
        Request(
            31,
            "GET_INFLIGHT_FD",
            p.INFLIGHT,
            reply=p.INFLIGHT,
            reply_fd=True,
            gate=Gate(protocol=F.INFLIGHT_SHMFD),
            see="Inflight I/O tracking",
        ),
        Request(
            32,
            "SET_INFLIGHT_FD",
            p.INFLIGHT,
            ONE_FD,
            gate=Gate(protocol=F.INFLIGHT_SHMFD),
            legal=Legal.RINGS_STOPPED,
            see="Inflight I/O tracking",
        ),
        Request(33, "GPU_SET_SOCKET", fds=ONE_FD, gate=Gate(device=DeviceType.GPU)),
        Request(34, "RESET_DEVICE", gate=Gate(offered=F.RESET_DEVICE)),
        Request(
            35, "VRING_KICK", p.VRING_STATE, gate=Gate(protocol=F.INBAND_NOTIFICATIONS), see="In-band notifications"
        ),
        Request(36, "GET_MAX_MEM_SLOTS", reply=p.U64_PAYLOAD, gate=Gate(protocol=F.CONFIGURE_MEM_SLOTS)),
        Request(37, "ADD_MEM_REG", p.SINGLE_REGION, ONE_FD, gate=Gate(protocol=F.CONFIGURE_MEM_SLOTS)),
        Request(38, "REM_MEM_REG", p.SINGLE_REGION, UP_TO_ONE_FD, gate=Gate(protocol=F.CONFIGURE_MEM_SLOTS)),
        Request(39, "SET_STATUS", p.U64_PAYLOAD, gate=Gate(protocol=F.STATUS)),
        Request(40, "GET_STATUS", reply=p.U64_PAYLOAD, gate=Gate(protocol=F.STATUS)),
        Request(
            41,
            "GET_SHARED_OBJECT",
            p.SHARED_OBJECT,
            reply=p.EMPTY,
            reply_fd=True,
            gate=Gate(protocol=F.SHARED_OBJECT),
            refusal=b"",
        ),
        Request(
            42,
            "SET_DEVICE_STATE_FD",
            p.DEVICE_STATE,
            ONE_FD,
            reply=p.U64_PAYLOAD,
            reply_fd=True,
            gate=Gate(protocol=F.DEVICE_STATE),
            legal=Legal.RINGS_STOPPED,
            refusal=_u64(p.NO_FD | 1),
            see=_SUSPENDED,
        ),
        Request(43, "CHECK_DEVICE_STATE", reply=p.U64_PAYLOAD, gate=Gate(protocol=F.DEVICE_STATE), refusal=NACK),
        Request(44, "GET_SHMEM_CONFIG", reply=p.SHMEM_CONFIG, gate=Gate(protocol=F.SHMEM)),
    )
}
"""What a front-end may send, by number (vhost-user, "Front-end message types")."""

BACK_END_REQUESTS: dict[int, Request] = {
    request.number: request
    for request in (
        Request(1, "BACKEND_IOTLB_MSG", p.IOTLB, gate=Gate(virtio=DeviceFeature.ACCESS_PLATFORM), see="IOMMU support"),
        Request(2, "BACKEND_CONFIG_CHANGE_MSG", gate=Gate(protocol=F.CONFIG)),
        Request(
            3,
            "BACKEND_VRING_HOST_NOTIFIER_MSG",
            p.VRING_AREA,
            Fds(0, 1, "1, or none to deregister"),
            gate=Gate(protocol=F.HOST_NOTIFIER),
        ),
        Request(4, "BACKEND_VRING_CALL", p.VRING_STATE, gate=Gate(protocol=F.INBAND_NOTIFICATIONS)),
        Request(5, "BACKEND_VRING_ERR", p.VRING_STATE, gate=Gate(protocol=F.INBAND_NOTIFICATIONS)),
        Request(6, "BACKEND_SHARED_OBJECT_ADD", p.SHARED_OBJECT, gate=Gate(protocol=F.SHARED_OBJECT)),
        Request(7, "BACKEND_SHARED_OBJECT_REMOVE", p.SHARED_OBJECT, gate=Gate(protocol=F.SHARED_OBJECT)),
        Request(
            8,
            "BACKEND_SHARED_OBJECT_LOOKUP",
            p.SHARED_OBJECT,
            reply=p.U64_PAYLOAD,
            reply_fd=True,
            gate=Gate(protocol=F.SHARED_OBJECT),
            refusal=NACK,
        ),
        Request(9, "BACKEND_SHMEM_MAP", p.MMAP, ONE_FD, gate=Gate(protocol=F.SHMEM)),
        Request(10, "BACKEND_SHMEM_UNMAP", p.MMAP, gate=Gate(protocol=F.SHMEM)),
    )
}
"""What a back-end may send over the channel of SET_BACKEND_REQ_FD (vhost-user, "Back-end message types")."""

FRONT_END_BY_NAME: dict[str, Request] = {request.name: request for request in FRONT_END_REQUESTS.values()}
BACK_END_BY_NAME: dict[str, Request] = {request.name: request for request in BACK_END_REQUESTS.values()}
