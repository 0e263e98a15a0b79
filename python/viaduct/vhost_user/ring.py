"""One virtqueue as the protocol builds it up, message by message (vhost-user, "Ring states").

A ring has two independent states: started or stopped, and enabled or disabled. It can start when its size, its
addresses and its kick are known, features are acknowledged and the memory holds it; GET_VRING_BASE stops it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from viaduct.vhost_user.device import Vring
from viaduct.vhost_user.errors import RequestError
from viaduct.vhost_user.memory_table import MemoryTable
from viaduct.vhost_user.payloads import VringAddr
from viaduct.virtio.features import DeviceFeature

MAX_SIZE = 32768
"""Descriptors in a queue (virtio 1.2, 2.6 and 2.8)."""
LOG_FLAG = 1
"""VHOST_VRING_F_LOG in SET_VRING_ADDR (vhost-user, "A vring address description")."""
PACKED_START = 0x8000_8000
"""Both indices zero, both wrap counters one (virtio 1.2, 2.8.1)."""


class Part(NamedTuple):
    """One of the three pieces of a ring in memory."""

    name: str
    addr: int
    size: int
    alignment: int
    section: str


def ring_parts(addr: VringAddr, size: int, features: int) -> tuple[Part, Part, Part]:
    """Where the pieces lie, how long they are and how they must be aligned (virtio 1.2, 2.7 and 2.8)."""
    if features & DeviceFeature.RING_PACKED:
        section = "virtio 1.2, 2.8"
        return (
            Part("descriptor ring", addr.descriptor, 16 * size, 16, section),
            Part("driver event suppression", addr.available, 4, 4, section),
            Part("device event suppression", addr.used, 4, 4, section),
        )
    section = "virtio 1.2, 2.7"
    event = 2 if features & DeviceFeature.EVENT_IDX else 0
    return (
        Part("descriptor table", addr.descriptor, 16 * size, 16, section),
        Part("available ring", addr.available, 4 + 2 * size + event, 2, section),
        Part("used ring", addr.used, 4 + 8 * size + event, 4, section),
    )


def check_size(size: int, features: int) -> None:
    """Raises `RequestError` unless the layout in `features` takes this number of descriptors."""
    packed = bool(features & DeviceFeature.RING_PACKED)
    if not 0 < size <= MAX_SIZE or (not packed and size & (size - 1)):
        allowed = f"1 to {MAX_SIZE}" if packed else f"a power of two up to {MAX_SIZE}"
        raise RequestError(f"queue size {size}", allowed, "virtio 1.2, 2.8" if packed else "virtio 1.2, 2.7")


def packed_base(base: int) -> int:
    """A packed ring's SET_VRING_BASE with both indices. DPDK's front-end and back-end leave the upper half, the used
    index, zero and mean that nothing is in flight: then it equals the available index. A true zero half (index 0, wrap
    counter 0) with requests in flight does not occur here, since our devices stop with none."""
    return base if base >> 16 else base << 16 | base


class Ring:
    """What is known of one ring. Owns its file descriptors."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.size: int | None = None
        self.addr: VringAddr | None = None
        self.base: int | None = None
        self.kicked = False
        """SET_VRING_KICK has come since the ring last stopped."""
        self.kick_fd: int | None = None
        self.call_fd: int | None = None
        self.err_fd: int | None = None
        self.started = False
        self.enabled = False
        self.awaits_translation = False
        """It starts when the IOMMU's translations of its addresses have come."""
        self.failure: str | None = None
        """Why the device gave the running ring up."""

    @property
    def log_addr(self) -> int | None:
        """Where writes to the used part are logged: as if it began at this guest-physical address. None: they are not
        (VHOST_VRING_F_LOG)."""
        return self.addr.log if self.addr is not None and self.addr.flags & LOG_FLAG else None

    def lies_at(self, addr: VringAddr) -> bool:
        """Whether the parts lie there already; how they are logged does not count."""
        return self.addr is not None and self.addr == addr._replace(flags=self.addr.flags, log=self.addr.log)

    def check_place(self, memory: MemoryTable, features: int) -> None:
        """Raises `RequestError` if size, alignment or place of what is known so far is wrong."""
        if self.size is None or self.addr is None:
            return
        check_size(self.size, features)
        for part in ring_parts(self.addr, self.size, features):
            if part.addr % part.alignment:
                raise RequestError(
                    f"ring {self.index}: {part.name} at {part.addr:#x}", f"multiples of {part.alignment}", part.section
                )
            if features & DeviceFeature.ACCESS_PLATFORM:
                continue  # An I/O virtual address: whether it leads anywhere is for the IOMMU to say.
            if memory.regions and not memory.holds_user_range(part.addr, part.size):
                regions = "; ".join(f"[{region}]" for region in memory.regions[:8])
                raise RequestError(
                    f"ring {self.index}: {part.name} of {part.size:#x} bytes at user address {part.addr:#x}",
                    f"a place inside one region of the memory table: {regions}",
                    'vhost-user, "VHOST_USER_SET_VRING_ADDR" and "Memory access"',
                )

    def vring(self, features: int) -> Vring | None:
        """The start parameters, or None while something is missing."""
        if self.size is None or self.addr is None or not self.kicked:
            return None
        packed = bool(features & DeviceFeature.RING_PACKED)
        if self.base is None:
            base = PACKED_START if packed else 0
        else:
            base = packed_base(self.base) if packed else self.base & 0xFFFF
        return Vring(
            index=self.index,
            size=self.size,
            descriptor_addr=self.addr.descriptor,
            driver_addr=self.addr.available,
            device_addr=self.addr.used,
            base=base,
            kick_fd=self.kick_fd,
            call_fd=self.call_fd,
            err_fd=self.err_fd,
            log_addr=self.log_addr,
        )

    def set_kick(self, fd: int | None) -> None:
        """Takes over a new kick descriptor, or None for polling."""
        self.drop_kick()
        self.kick_fd, self.kicked = fd, True

    def drop_kick(self) -> None:
        """The ring has stopped: it starts again with the next SET_VRING_KICK."""
        _close(self.kick_fd)
        self.kick_fd, self.kicked, self.awaits_translation = None, False, False

    def replace_call(self, fd: int | None) -> int | None:
        """Puts `fd` in place and returns the old descriptor, which the caller closes."""
        old, self.call_fd = self.call_fd, fd
        return old

    def replace_err(self, fd: int | None) -> int | None:
        """Puts `fd` in place and returns the old descriptor, which the caller closes."""
        old, self.err_fd = self.err_fd, fd
        return old

    def forget(self) -> None:
        """RESET_DEVICE: back to the initial state. Call and error descriptors stay, as QEMU does not send them
        again."""
        self.drop_kick()
        self.size = self.addr = self.base = self.failure = None
        self.started = self.enabled = False

    def close(self) -> None:
        """Closes all descriptors."""
        self.drop_kick()
        _close(self.call_fd)
        _close(self.err_fd)
        self.call_fd = self.err_fd = None


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
