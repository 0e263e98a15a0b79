"""The payloads of vhost-user messages (vhost-user, "Payload").

Each layout turns bytes into a named tuple and back, and states which sizes it takes. All numbers are in the machine's
byte order. Where front-ends in use send a structure with its C padding and the document shows none (IOTLB message: 26
or 32 bytes, inflight description: 20 or 24), both sizes are taken and the padded one is sent, which is what QEMU and
DPDK do.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from viaduct.vhost_user.errors import RequestError

MAX_REGIONS = 8
"""Regions in one SET_MEM_TABLE, and file descriptors in one message."""
MAX_CONFIG_SIZE = 256
"""Bytes of configuration space in one message; the limit of QEMU and DPDK."""
NO_FD = 1 << 8
"""The invalid FD flag in the payload of SET_VRING_KICK, _CALL and _ERR."""
INDEX_MASK = 0xFF
"""The vring's index in the same payload."""


class VringState(NamedTuple):
    """Also the descriptor index or indices of SET_VRING_BASE and GET_VRING_BASE."""

    vring: int
    num: int


class VringFd(NamedTuple):
    """The u64 of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR."""

    value: int

    @property
    def vring(self) -> int:
        """The ring's index."""
        return self.value & INDEX_MASK

    @property
    def no_fd(self) -> bool:
        """No descriptor comes with this message: poll instead."""
        return bool(self.value & NO_FD)


class VringAddr(NamedTuple):
    vring: int
    flags: int
    descriptor: int
    used: int
    """Used ring, or device event suppression structure."""
    available: int
    """Available ring, or driver event suppression structure."""
    log: int


class Region(NamedTuple):
    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int

    def __str__(self) -> str:
        place = f"guest {self.guest_addr:#x}, size {self.size:#x}, user {self.user_addr:#x}"
        return f"{place}, file offset {self.mmap_offset:#x}"


class Regions(NamedTuple):
    regions: tuple[Region, ...]


class Log(NamedTuple):
    size: int
    offset: int


class Iotlb(NamedTuple):
    iova: int
    size: int
    user_addr: int
    permissions: int
    type: int


class Config(NamedTuple):
    offset: int
    size: int
    flags: int
    data: bytes


class InflightDescription(NamedTuple):
    mmap_size: int
    mmap_offset: int
    queue_count: int
    queue_size: int


class VringArea(NamedTuple):
    value: int
    size: int
    offset: int


class DeviceState(NamedTuple):
    direction: int
    phase: int


class U64(NamedTuple):
    value: int


class Empty(NamedTuple):
    pass


class Opaque(NamedTuple):
    """Bytes of a message that no network device can meet: passed by, never interpreted."""

    data: bytes


Payload = (
    Empty
    | U64
    | VringState
    | VringFd
    | VringAddr
    | Region
    | Regions
    | Log
    | Iotlb
    | Config
    | InflightDescription
    | VringArea
    | DeviceState
    | Opaque
)


class Layout(NamedTuple):
    """One payload's layout: `sizes` as the documentation names them, `parse` raises `RequestError`, `pack` inverts
    it."""

    title: str
    sizes: str
    example: bytes
    """A well-formed instance, for the documentation's checks and as seed of the fuzz corpus."""
    parse: Callable[[bytes], Any]
    pack: Callable[[Any], bytes]

    def __str__(self) -> str:
        return self.title


def _wrong_size(title: str, found: int, sizes: str) -> RequestError:
    return RequestError(f"payload of {found} bytes", f"{sizes} bytes: {title}", 'vhost-user, "Payload"')


def _fixed(title: str, kind: Callable[..., Any], fields: str, padding: int = 0) -> Layout:
    """A layout of `fields` (struct notation), which may be followed by `padding` bytes and is sent with them."""
    form = struct.Struct("=" + fields)
    sizes = f"{form.size} or {form.size + padding}" if padding else f"{form.size}"

    def parse(data: bytes) -> Any:
        if len(data) not in (form.size, form.size + padding):
            raise _wrong_size(title, len(data), sizes)
        return kind(*form.unpack_from(data))

    def pack(payload: Any) -> bytes:
        return form.pack(*payload) + bytes(padding)

    return Layout(title, sizes, bytes(form.size + padding), parse, pack)


_REGION = struct.Struct("=QQQQ")
_REGIONS_HEAD = struct.Struct("=II")
_SINGLE_REGION = struct.Struct("=QQQQQ")
_CONFIG_HEAD = struct.Struct("=III")


def _parse_regions(data: bytes) -> Regions:
    if len(data) < _REGIONS_HEAD.size:
        raise _wrong_size(REGIONS.title, len(data), REGIONS.sizes)
    count, _ = _REGIONS_HEAD.unpack_from(data)
    if count > MAX_REGIONS:
        raise RequestError(
            f"{count} regions", f"0 to {MAX_REGIONS}", 'vhost-user, "Multiple Memory regions description"'
        )
    if len(data) not in {_REGIONS_HEAD.size + _REGION.size * n for n in (count, MAX_REGIONS)}:
        raise _wrong_size(f"{REGIONS.title} with {count} regions", len(data), REGIONS.sizes)
    starts = range(_REGIONS_HEAD.size, _REGIONS_HEAD.size + count * _REGION.size, _REGION.size)
    return Regions(tuple(Region(*_REGION.unpack_from(data, start)) for start in starts))


def _pack_regions(payload: Regions) -> bytes:
    head = _REGIONS_HEAD.pack(len(payload.regions), 0)
    return head + b"".join(_REGION.pack(*region) for region in payload.regions)


def _parse_single_region(data: bytes) -> Region:
    if len(data) != _SINGLE_REGION.size:
        raise _wrong_size(SINGLE_REGION.title, len(data), SINGLE_REGION.sizes)
    return Region(*_SINGLE_REGION.unpack(data)[1:])


def _parse_config(data: bytes) -> Config:
    if len(data) < _CONFIG_HEAD.size:
        raise _wrong_size(CONFIG.title, len(data), CONFIG.sizes)
    offset, size, flags = _CONFIG_HEAD.unpack_from(data)
    if not 0 < size <= MAX_CONFIG_SIZE or offset + size > MAX_CONFIG_SIZE:
        raise RequestError(
            f"{size} bytes at offset {offset} of the configuration space",
            f"1 byte or more that end at {MAX_CONFIG_SIZE} at the latest",
            'vhost-user, "Virtio device config space"',
        )
    if len(data) != _CONFIG_HEAD.size + size:
        raise _wrong_size(f"{CONFIG.title} with size {size}", len(data), CONFIG.sizes)
    return Config(offset, size, flags, bytes(data[_CONFIG_HEAD.size :]))


def _pack_config(payload: Config) -> bytes:
    return _CONFIG_HEAD.pack(payload.offset, payload.size, payload.flags) + payload.data


def _parse_log_fd(data: bytes) -> Empty:
    if len(data) not in (0, 8):
        raise _wrong_size("none, or a u64 that is ignored", len(data), "0 or 8")
    return Empty()


def _parse_log_base(data: bytes) -> Log:
    if len(data) == 8:
        return Log(0, int.from_bytes(data, "little"))
    parsed: Log = LOG.parse(data)
    return parsed


def _opaque(title: str, size: int) -> Layout:
    return Layout(title, "any", bytes(size), lambda data: Opaque(bytes(data)), lambda payload: bytes(payload.data))


EMPTY = _fixed("none", Empty, "")
U64_PAYLOAD = _fixed("u64", U64, "Q")
VRING_STATE = _fixed("vring state description", VringState, "II")
VRING_INDICES = _fixed("vring descriptor index or indices", VringState, "II")
VRING_FD = _fixed("u64: vring index and invalid FD flag", VringFd, "Q")
VRING_ADDR = _fixed("vring address description", VringAddr, "IIQQQQ")
REGIONS = Layout(
    "multiple memory regions description",
    "8 + 32 for each region",
    _REGIONS_HEAD.pack(0, 0),
    _parse_regions,
    _pack_regions,
)
SINGLE_REGION = Layout(
    "single memory region description",
    "40",
    bytes(_SINGLE_REGION.size),
    _parse_single_region,
    lambda region: _SINGLE_REGION.pack(0, *region),
)
LOG = _fixed("log description", Log, "QQ")
LOG_BASE = Layout("log description, or a u64", "16 or 8", bytes(16), _parse_log_base, LOG.pack)
LOG_FD = Layout("none", "0 or 8", b"", _parse_log_fd, lambda payload: b"")
IOTLB = _fixed("IOTLB message", Iotlb, "QQQBB", padding=6)
CONFIG = Layout(
    "virtio device config space", "12 + size", _CONFIG_HEAD.pack(0, 1, 0) + b"\0", _parse_config, _pack_config
)
INFLIGHT = _fixed("inflight description", InflightDescription, "QQHH", padding=4)
VRING_AREA = _fixed("vring area description", VringArea, "QQQ")
DEVICE_STATE = _fixed("device state transfer parameters", DeviceState, "II")
SHARED_OBJECT = _opaque("VhostUserShared", 16)
CRYPTO_SESSION = _opaque("crypto session description", 64)
MMAP = _opaque("MMAP request", 40)
SHMEM_CONFIG = _opaque("VIRTIO shared memory region configuration", 8 + 256 * 8)
