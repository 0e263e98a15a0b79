"""The regions a front-end has shared, checked before they are mapped.

The checks are made here, with the message in hand, so that the answer can name the region and the rule; mapping is the
business of `viaduct._core.GuestMemory`, which is immutable like this table: a change gives a new table, and pollers
that still use the old memory keep its mappings alive.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING

from viaduct.vhost_user.errors import RequestError
from viaduct.vhost_user.payloads import Region
from viaduct.vhost_user.protocol import MAX_MEM_SLOTS

if TYPE_CHECKING:
    from viaduct._core import GuestMemory

_END = 1 << 64
_SECTION = 'vhost-user, "Memory region description"'


def empty_memory() -> GuestMemory:
    """A memory without regions."""
    from viaduct._core import GuestMemory

    return GuestMemory()


class RegionFile:
    """The file behind a region, kept open for a process that takes over and has to map it again."""

    def __init__(self, fd: int) -> None:
        """Duplicates `fd`. Raises OSError if this process may open no more."""
        info = os.fstat(fd)
        self.identity = info.st_dev, info.st_ino
        """What tells it from all others."""
        self.fd = os.dup(fd)

    def __del__(self) -> None:
        # Tables are immutable and share their files: the last one closes it.
        if hasattr(self, "fd"):
            os.close(self.fd)


class MemoryTable:
    """Regions and the memory they are mapped in."""

    def __init__(
        self,
        regions: tuple[Region, ...] = (),
        memory: GuestMemory | None = None,
        files: Mapping[Region, RegionFile] | None = None,
        repeats: Mapping[Region, int] | None = None,
    ) -> None:
        self.regions = regions
        self._memory = memory
        self._files = files or {}
        self._repeats = repeats or {}

    @property
    def memory(self) -> GuestMemory:
        """The mapped memory."""
        if self._memory is None:
            self._memory = empty_memory()
        return self._memory

    def with_region(self, region: Region, fd: int) -> MemoryTable:
        """This table and one more region from file `fd`, which stays the caller's. Raises `RequestError`."""
        if len(self.regions) == MAX_MEM_SLOTS:
            raise RequestError("one more region", f"{MAX_MEM_SLOTS}", 'vhost-user, "VHOST_USER_GET_MAX_MEM_SLOTS"')
        _check_range(region)
        _check_file(region, fd)
        for other in self.regions:
            for space in ("guest", "user"):
                if _overlap(region, other, space):
                    raise RequestError(
                        f"region [{region}] overlaps region [{other}] in {space} addresses",
                        "disjoint regions",
                        _SECTION,
                    )
        try:
            memory = self.memory.with_region(*region, fd)
            file = RegionFile(fd)
        except (OSError, ValueError) as error:
            raise RequestError(f"region [{region}] cannot be mapped: {error}", "a mappable file", _SECTION) from error
        return MemoryTable((*self.regions, region), memory, {**self._files, region: file}, self._repeats)

    def with_region_again(self, region: Region, fd: int) -> MemoryTable | None:
        """This table if it has the very region, of the same file, already; then it takes one more removal to remove it.

        QEMU before 8.0 adds and removes each region once for every queue pair of a multiqueue device.
        """
        file, info = self._files.get(region), os.fstat(fd)
        if file is None or file.identity != (info.st_dev, info.st_ino):
            return None
        repeats = {**self._repeats, region: self._repeats.get(region, 0) + 1}
        return MemoryTable(self.regions, self.memory, self._files, repeats)

    def without_region(self, region: Region) -> MemoryTable:
        """This table without the region that has these addresses and size; the offset is ignored. Raises
        `RequestError`."""
        for i, other in enumerate(self.regions):
            if other[:3] == region[:3]:
                left = self._repeats.get(other, 0) - 1
                if left >= 0:
                    return MemoryTable(self.regions, self.memory, self._files, {**self._repeats, other: left})
                memory = self.memory.without_region(*region[:3])
                files = {kept: file for kept, file in self._files.items() if kept != other}
                return MemoryTable(self.regions[:i] + self.regions[i + 1 :], memory, files, self._repeats)
        raise RequestError(
            f"no region [{region}]",
            "; ".join(f"[{other}]" for other in self.regions[:8]) or "none, the table is empty",
            'vhost-user, "VHOST_USER_REM_MEM_REG"',
        )

    def file_of(self, region: Region) -> RegionFile:
        """The file behind one of the regions."""
        return self._files[region]

    def repeats_of(self, region: Region) -> int:
        """How many removals of the region are to be ignored."""
        return self._repeats.get(region, 0)

    def holds_user_range(self, addr: int, size: int) -> bool:
        """Whether the front-end-virtual range lies inside one region."""
        return any(r.user_addr <= addr and addr + size <= r.user_addr + r.size for r in self.regions)


def _check_range(region: Region) -> None:
    if region.size == 0:
        raise RequestError(f"region [{region}] is empty", "a size above zero", _SECTION)
    for name, start in (("guest", region.guest_addr), ("user", region.user_addr), ("file", region.mmap_offset)):
        if start + region.size > _END:
            raise RequestError(
                f"region [{region}] ends beyond 64 bits in {name} addresses", "an end of at most 2^64", _SECTION
            )


def _check_file(region: Region, fd: int) -> None:
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and region.mmap_offset + region.size > info.st_size:
        raise RequestError(
            f"region [{region}] ends at {region.mmap_offset + region.size:#x} of its file",
            f"up to the file's size, {info.st_size:#x}",
            _SECTION,
        )


def _overlap(a: Region, b: Region, space: str) -> bool:
    start_a, start_b = (a.guest_addr, b.guest_addr) if space == "guest" else (a.user_addr, b.user_addr)
    return start_a < start_b + b.size and start_b < start_a + a.size
