"""Linux as a bzImage, by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).

The file is real-mode code of (setup_sects + 1) sectors, with the setup header in it, and then the protected-mode
kernel, which unpacks itself. The first part is for a BIOS and stays in the file; the header goes into the zero page,
the second part to the address that the kernel prefers, or to another if it can be moved. From there on it needs
init_size bytes, which is more than the file has. It is entered in 64-bit mode, 0x200 bytes after its start, with the
zero page's address in RSI.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from viaduct.vmm.boot.cpu_state import CpuState
from viaduct.vmm.boot.entry_modes import long_mode
from viaduct.vmm.boot.image import Image
from viaduct.vmm.boot.request import BootRequest
from viaduct.vmm.boot.zero_page import SETUP_HEADER, place_zero_page
from viaduct.vmm.memory_map import EXTENDED_START, PAGE, RAM_LOW_END

SECTOR = 512
HEADER_START, HEADER_READ = 0x1F1, 0x290
BOOT_FLAG, MAGIC = 0xAA55, b"HdrS"
ENTRY_64 = 0x200
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
VERSION_64 = 0x20C
"""The first version of the protocol with a 64-bit entry, of Linux 3.8."""


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """The setup header, as far as the loader needs it; boot.rst's names."""

    raw: bytes
    setup_sects: int
    syssize: int
    version: int
    loadflags: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable_kernel: int
    min_alignment: int
    xloadflags: int
    cmdline_size: int
    payload_offset: int
    payload_length: int
    pref_address: int
    init_size: int

    @property
    def kernel_offset(self) -> int:
        """Where in the file the protected-mode kernel begins."""
        return (self.setup_sects + 1) * SECTOR

    @property
    def kernel_size(self) -> int:
        """Its size in bytes, in the file."""
        return self.syssize * 16


def is_bzimage(start: bytes) -> bool:
    """Whether a file that starts so has the setup header of Linux."""
    return start[0x1FE:0x200] == struct.pack("<H", BOOT_FLAG) and start[0x202:0x206] == MAGIC


def read_setup_header(image: Image) -> SetupHeader:
    """The header of a bzImage that has a 64-bit entry. Raises BootError if it has none, or the file is truncated."""
    page = image.read(0, HEADER_READ, "the setup header")

    def field(layout: str, offset: int) -> int:
        return int(struct.unpack_from("<" + layout, page, offset)[0])

    version = field("H", 0x206)
    next_step = f"use a 64-bit kernel of Linux 3.8 or newer ({image.name} may be one for 32-bit machines)"
    if version < VERSION_64:
        raise image.error(
            f"speaks version {version >> 8}.{version & 0xFF:02} of the boot protocol, which has no 64-bit entry",
            next_step,
        )
    header = SetupHeader(
        raw=page[HEADER_START : min(0x202 + page[0x201], HEADER_READ)],
        setup_sects=page[0x1F1] or 4,
        syssize=field("I", 0x1F4),
        version=version,
        loadflags=page[0x211],
        initrd_addr_max=field("I", 0x22C),
        kernel_alignment=field("I", 0x230),
        relocatable_kernel=page[0x234],
        min_alignment=page[0x235],
        xloadflags=field("H", 0x236),
        cmdline_size=field("I", 0x238),
        payload_offset=field("I", 0x248),
        payload_length=field("I", 0x24C),
        pref_address=field("Q", 0x258),
        init_size=field("I", 0x260),
    )
    if not header.xloadflags & XLF_KERNEL_64:
        raise image.error(f"has no 64-bit entry (xloadflags {header.xloadflags:#x} without bit 0)", next_step)
    if not header.loadflags & LOADED_HIGH:
        raise image.error(f"is a zImage (loadflags {header.loadflags:#x} without bit 0)", "use a bzImage")
    if header.kernel_offset + header.kernel_size > image.size or not header.kernel_size > ENTRY_64:
        raise image.error(
            f"has {image.size} bytes, but its header speaks of {header.kernel_offset + header.kernel_size}",
            "it is truncated or damaged: copy or download it again",
        )
    return header


def load_bzimage(request: BootRequest) -> CpuState:
    """Put the kernel and all it needs into RAM. Raises BootError where that cannot be."""
    image, ram = request.kernel, request.ram
    header = read_setup_header(image)
    needed = max(header.init_size, header.kernel_size)
    address = _address(request, header, needed)
    ram.claim(address, needed, "the kernel", image.name)
    ram.copy(image, header.kernel_offset, header.kernel_size, address, "the protected-mode kernel")
    command_line = request.place_command_line(header.cmdline_size)
    initrd = request.place_initrd(above=address + needed, below=min(header.initrd_addr_max + 1, RAM_LOW_END))
    zero_page = place_zero_page(request, _with_address(header, address), command_line, initrd)
    return long_mode(ram, address + ENTRY_64, rsi=zero_page)


def _address(request: BootRequest, header: SetupHeader, needed: int) -> int:
    """Where the kernel goes: where it prefers to be, or if there is no room and it can be moved, as low as possible."""
    ram, preferred = request.ram, header.pref_address or EXTENDED_START
    if not header.relocatable_kernel:
        return preferred
    alignment = header.kernel_alignment
    if alignment < PAGE or alignment & (alignment - 1):
        raise request.kernel.error(
            f"wants to be aligned to {alignment:#x} bytes", "it is damaged: a power of two from 4096 on is possible"
        )
    smallest = max(1 << min(header.min_alignment, 63), PAGE) if header.min_alignment else alignment
    for above, step in ((preferred, alignment), (EXTENDED_START, alignment), (EXTENDED_START, smallest)):
        found = ram.lowest(needed, above=above, alignment=step, below=RAM_LOW_END)
        if found is not None:
            return found
    raise request.kernel.error(
        f"needs {needed} bytes from {EXTENDED_START:#x} on, at a multiple of {smallest:#x}, but RAM is at {ram}",
        f"give the machine more memory (--memory): at least {-(-(preferred + needed) // EXTENDED_START)}M",
    )


def _with_address(header: SetupHeader, address: int) -> bytes:
    """The setup header, told where the kernel was loaded (code32_start)."""
    raw = bytearray(header.raw)
    struct.pack_into("<I", raw, 0x214 - SETUP_HEADER, address)
    return bytes(raw)
