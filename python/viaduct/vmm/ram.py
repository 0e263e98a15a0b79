"""A machine's RAM, mapped into this process, and shared with whoever serves a queue.

Guest-physical memory is this process's own virtual memory, so a device reaches it by loads and stores. User addresses
equal guest-physical ones. Where nobody else has to see it, it is anonymous memory: the system has huge pages for that,
and a guest leaves its processor once for 2 MiB that it touches for the first time, and not 512 times. If a back-end in
another process has to have it too (vhost-user, "Memory access"), it is a file in memory, in which the pieces of
`memory_map.ram_regions` lie one after the other.

RAM that goes on from a snapshot comes from the snapshot's file, which must not change: pages are read as they are
touched, and what is written stays private. But then nobody else can see them. If somebody has to, a second file of the
same blocks is taken where the file system can make one, and elsewhere the file is copied.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from viaduct._core import GuestMemory
from viaduct.vhost_user.payloads import Region
from viaduct.vmm.errors import MachineError
from viaduct.vmm.memory_map import PAGE, ram_regions

FICLONE = 0x40049409
"""linux/fs.h: a file of the same blocks, which are copied when one of the two writes to them."""


class Ram:
    """`size` bytes of guest memory, a whole number of pages: zeroes, or what the file `content` has.

    `shared`: another process has to see it.

    Raises:
        MachineError: the size is impossible, or more than this host has, or not that of the file.
    """

    def __init__(self, size: int, *, content: Path | None = None, shared: bool = True) -> None:
        if size <= 0 or size % PAGE:
            raise MachineError(f"memory of {size} bytes is not possible: one or more whole pages of {PAGE} bytes")
        self.size = size
        self.fd: int | None = None
        """The file; None: there is none."""
        try:
            private = False
            if content is not None:
                self.fd, private = _content(size, content, shared)
            elif shared:
                self.fd = _new_file(size)
            else:
                _check_size(size)
            self.memory = GuestMemory()
            """The memory as device models see it."""
            for region in self.regions:
                self.memory = self.memory.with_region(
                    region.guest_addr, region.size, region.user_addr, region.mmap_offset, self.fd, private
                )
        except (OSError, ValueError) as error:
            self.close()
            raise MachineError(f"{size >> 20} MiB of memory cannot be had: {error}") from error

    @property
    def regions(self) -> tuple[Region, ...]:
        """The pieces as vhost-user describes them."""
        regions, offset = [], 0
        for guest_addr, size in ram_regions(self.size):
            regions.append(Region(guest_addr, size, guest_addr, offset))
            offset += size
        return tuple(regions)

    def save(self, path: Path) -> None:
        """Writes what the memory holds into a new file; pages of zeroes take no room in it. The guest stands still.

        Raises:
            OSError: the file cannot be written.
        """
        with open(path, "xb", buffering=0) as file:
            os.ftruncate(file.fileno(), self.size)
            for region in self.regions:
                for start in range(0, region.size, _PIECE):
                    piece = self.memory.read(region.guest_addr + start, min(_PIECE, region.size - start))
                    _write_pages(file.fileno(), piece, region.mmap_offset + start)
            os.fsync(file.fileno())

    def close(self) -> None:
        """Lets go of the file; mappings of it live as long as somebody has them."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


_PIECE = 1 << 20
_ZEROES = bytes(_PIECE)


def _check_size(size: int) -> None:
    # How much of the host's memory is free changes by the second; more than there is cannot be meant.
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > total:
        raise MachineError(
            f"memory of {size >> 20} MiB is more than this host's {total >> 20} MiB; ask for less, with --memory"
        )


def _new_file(size: int) -> int:
    _check_size(size)
    fd = os.memfd_create("viaduct machine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def _content(size: int, path: Path, shared: bool) -> tuple[int, bool]:
    """A descriptor of that content, and whether it may be mapped privately only."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if (found := os.fstat(source).st_size) != size:
            raise MachineError(f"{path} has {found} bytes, and the machine's memory {size}; the snapshot is damaged")
        if not shared:
            return source, True
        if (clone := _clone(source, path)) is not None:
            os.close(source)
            return clone, False
        fd = _new_file(size)
        _copy(source, fd)
        os.close(source)
        return fd, False
    except BaseException:
        os.close(source)
        raise


def _clone(source: int, path: Path) -> int | None:
    """A nameless file of the same blocks, if the file system can make one."""
    try:
        clone = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.ioctl(clone, FICLONE, source)
    except OSError:
        os.close(clone)
        return None
    return clone


def _copy(source: int, to: int) -> None:
    """What is no hole."""
    start, size = 0, os.fstat(source).st_size
    while start < size:
        try:
            start = os.lseek(source, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        while start < end:
            piece = os.pread(source, min(_PIECE, end - start), start)
            os.pwrite(to, piece, start)
            start += len(piece)


def _write_pages(fd: int, piece: bytes, offset: int) -> None:
    """The pages of a piece that are not zero, neighbours together."""
    if piece == _ZEROES[: len(piece)]:
        return
    start: int | None = None
    for page in range(0, len(piece) + PAGE, PAGE):
        zero = page >= len(piece) or piece[page : page + PAGE] == _ZEROES[:PAGE]
        if zero and start is not None:
            os.pwrite(fd, piece[start:page], offset + start)
            start = None
        elif not zero and start is None:
            start = page
