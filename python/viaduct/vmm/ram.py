"""A machine's RAM: one memfd, mapped into this process, shared with whoever serves a queue.

Guest-physical memory is this process's own virtual memory, so a device reaches it by loads and stores. It is a file so
that a back-end in another process can have it too (vhost-user, "Memory access"): the pieces of `memory_map.ram_regions`
lie in it one after the other, and user addresses equal guest-physical ones.
"""

from __future__ import annotations

import os

from viaduct._core import GuestMemory
from viaduct.vhost_user.payloads import Region
from viaduct.vmm.errors import MachineError
from viaduct.vmm.memory_map import PAGE, ram_regions


class Ram:
    """`size` bytes of guest memory, zeroes, a whole number of pages; from `fd` instead, which is taken over, if one is
    given.

    Raises:
        MachineError: the size is impossible, or more than this host has.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        if size <= 0 or size % PAGE:
            raise MachineError(f"memory of {size} bytes is not possible: one or more whole pages of {PAGE} bytes")
        self.size = size
        self.fd = os.memfd_create("viaduct machine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if fd is None else fd
        try:
            if fd is None:
                _check_host(size)
                os.ftruncate(self.fd, size)
            self.memory = GuestMemory()
            """The memory as device models see it."""
            for region in self.regions:
                self.memory = self.memory.with_region(
                    region.guest_addr, region.size, region.user_addr, region.mmap_offset, self.fd
                )
        except (OSError, ValueError) as error:
            self.close()
            raise MachineError(f"{size >> 20} MiB of memory cannot be had: {error}") from error
        except MachineError:
            self.close()
            raise

    @property
    def regions(self) -> tuple[Region, ...]:
        """The pieces as vhost-user describes them."""
        regions, offset = [], 0
        for guest_addr, size in ram_regions(self.size):
            regions.append(Region(guest_addr, size, guest_addr, offset))
            offset += size
        return tuple(regions)

    def close(self) -> None:
        """Lets go of the file; mappings of it live as long as somebody has them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _check_host(size: int) -> None:
    """Refuses memory that the host does not have at all; how much of it is free changes by the second."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > total:
        raise MachineError(
            f"memory of {size >> 20} MiB is more than this host's {total >> 20} MiB; ask for less, with --memory"
        )
