"""Device numbers and feature bits (virtio 1.2, sections 5 and 6).

The bits of a device are one 64-bit integer in which the device's own bits (0 to 23 and 50 to 127, virtio 1.2, 2.2) and
those that every device shares (24 to 49) stand side by side, so the enumerations here are combined with ``|`` as plain
integers: ``NetFeature.MAC | DeviceFeature.VERSION_1``. Members carry the section that defines them as ``section``.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class DeviceType(IntEnum):
    """Virtio device numbers (virtio 1.2, section 5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    SCSI = 8
    GPU = 16
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    FS = 26
    GPIO = 41
    I2C = 34


class Feature(IntFlag):
    """A feature bit that knows the section of its definition. Base of the enumerations below."""

    section: str

    def __new__(cls, value: int, section: str = "") -> Feature:
        member = int.__new__(cls, value)
        member._value_ = value
        member.section = section
        return member


class DeviceFeature(Feature):
    """Bits with the same meaning for every device (virtio 1.2, section 6), and the two that vhost reserved."""

    NOTIFY_ON_EMPTY = 1 << 24, "virtio 1.2, 6.3"
    LOG_ALL = 1 << 26, 'vhost-user, "Migration"'
    ANY_LAYOUT = 1 << 27, "virtio 1.2, 6.3"
    INDIRECT_DESC = 1 << 28, "virtio 1.2, 2.7.5.3 and 2.8.7"
    EVENT_IDX = 1 << 29, "virtio 1.2, 2.7.10 and 2.8.10"
    PROTOCOL_FEATURES = 1 << 30, 'vhost-user, "Communication"'
    VERSION_1 = 1 << 32, "virtio 1.2, 6.1"
    ACCESS_PLATFORM = 1 << 33, "virtio 1.2, 6.1"
    RING_PACKED = 1 << 34, "virtio 1.2, 2.8"
    IN_ORDER = 1 << 35, "virtio 1.2, 2.7.9 and 2.8.13"
    ORDER_PLATFORM = 1 << 36, "virtio 1.2, 6.1"
    SR_IOV = 1 << 37, "virtio 1.2, 6.1"
    NOTIFICATION_DATA = 1 << 38, "virtio 1.2, 2.9"
    NOTIF_CONFIG_DATA = 1 << 39, "virtio 1.2, 6.1"
    RING_RESET = 1 << 40, "virtio 1.2, 2.6.1"

    def __invert__(self) -> int:  # type: ignore[override]
        """All other bits, those without a name included. Not in the base, where Python 3.11 ignores it."""
        return ~int(self)


class NetFeature(Feature):
    """Bits of a network device (virtio 1.2, 5.1.3)."""

    CSUM = 1 << 0, "virtio 1.2, 5.1.6.2"
    GUEST_CSUM = 1 << 1, "virtio 1.2, 5.1.6.4"
    CTRL_GUEST_OFFLOADS = 1 << 2, "virtio 1.2, 5.1.6.5.6"
    MTU = 1 << 3, "virtio 1.2, 5.1.4"
    MAC = 1 << 5, "virtio 1.2, 5.1.4"
    GSO = 1 << 6, "virtio 1.2, 5.1.3.2"
    GUEST_TSO4 = 1 << 7, "virtio 1.2, 5.1.6.4"
    GUEST_TSO6 = 1 << 8, "virtio 1.2, 5.1.6.4"
    GUEST_ECN = 1 << 9, "virtio 1.2, 5.1.6.4"
    GUEST_UFO = 1 << 10, "virtio 1.2, 5.1.6.4"
    HOST_TSO4 = 1 << 11, "virtio 1.2, 5.1.6.2"
    HOST_TSO6 = 1 << 12, "virtio 1.2, 5.1.6.2"
    HOST_ECN = 1 << 13, "virtio 1.2, 5.1.6.2"
    HOST_UFO = 1 << 14, "virtio 1.2, 5.1.6.2"
    MRG_RXBUF = 1 << 15, "virtio 1.2, 5.1.6.3"
    STATUS = 1 << 16, "virtio 1.2, 5.1.4"
    CTRL_VQ = 1 << 17, "virtio 1.2, 5.1.6.5"
    CTRL_RX = 1 << 18, "virtio 1.2, 5.1.6.5.1"
    CTRL_VLAN = 1 << 19, "virtio 1.2, 5.1.6.5.3"
    CTRL_RX_EXTRA = 1 << 20, "virtio 1.2, 5.1.6.5.1"
    GUEST_ANNOUNCE = 1 << 21, "virtio 1.2, 5.1.6.5.4"
    MQ = 1 << 22, "virtio 1.2, 5.1.6.5.5"
    CTRL_MAC_ADDR = 1 << 23, "virtio 1.2, 5.1.6.5.2"
    NOTF_COAL = 1 << 53, "virtio 1.2, 5.1.6.5.8"
    GUEST_USO4 = 1 << 54, "virtio 1.3, 5.1.6.4"
    GUEST_USO6 = 1 << 55, "virtio 1.3, 5.1.6.4"
    HOST_USO = 1 << 56, "virtio 1.2, 5.1.6.2"
    HASH_REPORT = 1 << 57, "virtio 1.2, 5.1.6.4.3"
    GUEST_HDRLEN = 1 << 59, "virtio 1.2, 5.1.6.2"
    RSS = 1 << 60, "virtio 1.2, 5.1.6.5.7"
    RSC_EXT = 1 << 61, "virtio 1.2, 5.1.6.4"
    STANDBY = 1 << 62, "virtio 1.2, 5.1.3"
    SPEED_DUPLEX = 1 << 63, "virtio 1.2, 5.1.4"

    def __invert__(self) -> int:  # type: ignore[override]
        """All other bits, those without a name included. Not in the base, where Python 3.11 ignores it."""
        return ~int(self)


class BlockFeature(Feature):
    """Bits of a block device (virtio 1.2, 5.2.3)."""

    SIZE_MAX = 1 << 1, "virtio 1.2, 5.2.4"
    SEG_MAX = 1 << 2, "virtio 1.2, 5.2.4"
    GEOMETRY = 1 << 4, "virtio 1.2, 5.2.4"
    RO = 1 << 5, "virtio 1.2, 5.2.6.2"
    BLK_SIZE = 1 << 6, "virtio 1.2, 5.2.4"
    FLUSH = 1 << 9, "virtio 1.2, 5.2.6.2"
    TOPOLOGY = 1 << 10, "virtio 1.2, 5.2.4"
    CONFIG_WCE = 1 << 11, "virtio 1.2, 5.2.5.2"
    MQ = 1 << 12, "virtio 1.2, 5.2.2"
    DISCARD = 1 << 13, "virtio 1.2, 5.2.6"
    WRITE_ZEROES = 1 << 14, "virtio 1.2, 5.2.6"
    LIFETIME = 1 << 15, "virtio 1.2, 5.2.6"
    SECURE_ERASE = 1 << 16, "virtio 1.2, 5.2.6"

    def __invert__(self) -> int:  # type: ignore[override]
        """All other bits, those without a name included. Not in the base, where Python 3.11 ignores it."""
        return ~int(self)


class ConsoleFeature(Feature):
    """Bits of a console (virtio 1.2, 5.3.3)."""

    SIZE = 1 << 0, "virtio 1.2, 5.3.4"
    MULTIPORT = 1 << 1, "virtio 1.2, 5.3.6.2"
    EMERG_WRITE = 1 << 2, "virtio 1.2, 5.3.4"

    def __invert__(self) -> int:  # type: ignore[override]
        """All other bits, those without a name included. Not in the base, where Python 3.11 ignores it."""
        return ~int(self)


class BalloonFeature(Feature):
    """Bits of a memory balloon (virtio 1.2, 5.5.3)."""

    MUST_TELL_HOST = 1 << 0, "virtio 1.2, 5.5.6"
    STATS_VQ = 1 << 1, "virtio 1.2, 5.5.6.3"
    DEFLATE_ON_OOM = 1 << 2, "virtio 1.2, 5.5.3"
    FREE_PAGE_HINT = 1 << 3, "virtio 1.2, 5.5.6.5"
    PAGE_POISON = 1 << 4, "virtio 1.2, 5.5.6.6"
    REPORTING = 1 << 5, "virtio 1.2, 5.5.6.7"

    def __invert__(self) -> int:  # type: ignore[override]
        """All other bits, those without a name included. Not in the base, where Python 3.11 ignores it."""
        return ~int(self)


class VsockFeature(Feature):
    """Bits of a socket device (virtio 1.2, 5.10.3)."""

    STREAM = 1 << 0, "virtio 1.2, 5.10.6.6"
    SEQPACKET = 1 << 1, "virtio 1.2, 5.10.6.7"
    NO_IMPLIED_STREAM = 1 << 2, "virtio 1.3, 5.10.3"

    def __invert__(self) -> int:  # type: ignore[override]
        """All other bits, those without a name included. Not in the base, where Python 3.11 ignores it."""
        return ~int(self)


_OWN_BITS: dict[int, type[Feature]] = {
    DeviceType.NET: NetFeature,
    DeviceType.BLOCK: BlockFeature,
    DeviceType.CONSOLE: ConsoleFeature,
    DeviceType.BALLOON: BalloonFeature,
    DeviceType.VSOCK: VsockFeature,
}


def describe_features(features: int, device_id: int = 0) -> str:
    """Names the bits of `features` for an error message: ``"MAC, MRG_RXBUF, VERSION_1, bit 49"``.

    `device_id` says whose own bits they are (`DeviceType`); bits without a name are given by number.
    """
    names = []
    for bit in range(features.bit_length()):
        if not features >> bit & 1:
            continue
        for kind in (_OWN_BITS.get(device_id), DeviceFeature):
            if kind is not None and 1 << bit in kind.__members__.values():
                names.append(str(kind(1 << bit).name))
                break
        else:
            names.append(f"bit {bit}")
    return ", ".join(names) or "none"
