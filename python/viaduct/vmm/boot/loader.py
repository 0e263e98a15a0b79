"""Which kind of kernel a file is, and how it is started. docs/boot.md has the ways side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from viaduct._core import GuestMemory
from viaduct.vmm.boot import elf, low_memory
from viaduct.vmm.boot.acpi import acpi_tables
from viaduct.vmm.boot.bzimage import is_bzimage, load_bzimage
from viaduct.vmm.boot.cpu_state import CpuState
from viaduct.vmm.boot.errors import BootError
from viaduct.vmm.boot.flat import BOOT_SECTOR, load_flat
from viaduct.vmm.boot.image import Image
from viaduct.vmm.boot.linux_elf import load_linux_elf
from viaduct.vmm.boot.mp_tables import mp_tables
from viaduct.vmm.boot.multiboot import find_header, load_multiboot
from viaduct.vmm.boot.placement import Placement
from viaduct.vmm.boot.platform import Platform
from viaduct.vmm.boot.pvh import load_pvh, pvh_entry
from viaduct.vmm.boot.request import BootRequest
from viaduct.vmm.boot.reset_vector import RESET_CODE
from viaduct.vmm.memory_map import EXTENDED_START, MIB, VIRTIO_MMIO_SIZE, virtio_mmio_slot

LOADERS: dict[str, Callable[[BootRequest], CpuState]] = {
    "bzimage": load_bzimage,
    "pvh": load_pvh,
    "linux": load_linux_elf,
    "multiboot": load_multiboot,
}
PROTOCOLS = ("auto", *LOADERS, "flat")

NO_KERNELS = (
    (0, b"\x1f\x8b", "is packed with gzip", "unpack it (zcat), and if it is an initrd, name it with --initrd"),
    (0, b"\xfd7zXZ", "is packed with xz", "unpack it (xzcat), and if it is an initrd, name it with --initrd"),
    (0, b"\x28\xb5\x2f\xfd", "is packed with zstd", "unpack it (zstdcat); if it is an initrd, name it with --initrd"),
    (0, b"BZh", "is packed with bzip2", "unpack it (bzcat), and if it is an initrd, name it with --initrd"),
    (0, b"070701", "is a cpio archive", "name it with --initrd, and a kernel with --kernel"),
    (0, b"QFI\xfb", "is a disk image of QEMU (qcow2)", "name it with --disk, and a kernel with --kernel"),
    (0, b"KDMV", "is a disk image of VMware", "convert it (qemu-img convert -O raw) and name it with --disk"),
    (0, b"conectix", "is a disk image (VHD)", "convert it (qemu-img convert -O raw) and name it with --disk"),
    (0x38, b"ARM\x64", "is a kernel for ARM64", "use one for x86-64"),
    (0x24, b"\x18\x28\x6f\x01", "is a kernel for ARM", "use one for x86-64"),
    (0, b"MZ", "is a program for EFI", "use a bzImage: this one has no setup header of Linux"),
    (0, b"#!", "is a script", "name a kernel"),
    (0x1FE, b"\x55\xaa", "is a boot sector or a disk image", "--boot flat for a boot sector, --disk for an image"),
)


def load(
    memory: GuestMemory,
    kernel: str | Path,
    *,
    initrd: str | Path | None = None,
    command_line: str = "",
    boot: str = "auto",
    platform: Platform = Platform(),  # noqa: B008 - frozen
) -> CpuState:
    """Put a kernel and all it needs into guest memory, and say how the first vCPU starts.

    `memory` is that of a machine which was just switched on: zeroes. `boot` is one of `PROTOCOLS`; "flat" may be
    followed by ":" and an address. Raises BootError for anything that is wrong with what was given; the memory is of no
    use then.
    """
    protocol, _, place = boot.partition(":")
    if protocol not in PROTOCOLS or (place and protocol != "flat"):
        raise BootError(f"--boot {boot}", "is no way of booting", f"allowed: {', '.join(PROTOCOLS)} (flat:ADDRESS)")
    ram = Placement(memory)
    with ExitStack() as files:
        image = files.enter_context(Image.open(kernel, "--kernel"))
        if protocol == "flat":
            return _flat(ram, image, place, initrd, command_line)
        if protocol == "auto":
            protocol = recognise(image)
        if not ram.ranges or ram.ranges[0][0] != 0 or ram.ranges[0][1] < 2 * EXTENDED_START:
            raise BootError(
                f"--memory {ram.size}", f"RAM is at {ram}", f"kernels need at least {2 * EXTENDED_START // MIB} MiB"
            )
        if protocol in ("pvh", "linux") and is_bzimage(image.start(0x210)):
            from viaduct.vmm.boot.payload import unpack  # and all that Python has for unpacking

            image = files.enter_context(unpack(image, ram.size))
        _require_kind(image, protocol)
        archive = None if initrd is None else files.enter_context(Image.open(initrd, "--initrd"))
        request = BootRequest(
            ram, image, archive, _with_devices(command_line, platform), platform, _place_tables(ram, platform)
        )
        return LOADERS[protocol](request)


def recognise(image: Image) -> str:
    """The way to start this file, one of `PROTOCOLS`. Raises BootError where there is none."""
    start = image.start(8192)
    if is_bzimage(start):
        return "bzimage"
    multiboot = find_header(start) is not None
    if start.startswith(elf.MAGIC):
        kernel = elf.read_elf(image)
        if pvh_entry(kernel) is not None:
            return "pvh"
        return "multiboot" if multiboot else "linux"
    if multiboot:
        return "multiboot"
    raise _no_kernel(image, start)


def _require_kind(image: Image, protocol: str) -> None:
    """Raises BootError if a file is no kernel at all that the protocol could start."""
    start = image.start(8192)
    if protocol == "bzimage" and not is_bzimage(start):
        if start.startswith(elf.MAGIC):
            raise image.error("is an ELF file, no bzImage", "take --boot auto, pvh or linux")
        raise _no_kernel(image, start)
    if protocol in ("pvh", "linux") and not start.startswith(elf.MAGIC):
        raise _no_kernel(image, start)


def _no_kernel(image: Image, start: bytes) -> BootError:
    for offset, magic, found, advice in NO_KERNELS:
        if start[offset : offset + len(magic)] == magic:
            return image.error(found, advice)
    return image.error(
        f"begins with {start[:8].hex(' ')} and is no kernel that is known here",
        "use a bzImage (vmlinuz), an ELF kernel (vmlinux) or a multiboot kernel; --boot flat starts anything",
    )


def _flat(ram: Placement, image: Image, place: str, initrd: str | Path | None, command_line: str) -> CpuState:
    try:
        address = int(place, 0) if place else BOOT_SECTOR
    except ValueError:
        raise BootError(f"--boot flat:{place}", "has no address", "write it as 0x7c00 or 31744") from None
    for option, given in (("--initrd", initrd), ("--append", command_line)):
        if given:
            raise BootError(f"{option} {given}", "a flat binary cannot take it", "leave it out")
    return load_flat(ram, image, address)


def _with_devices(command_line: str, platform: Platform) -> str:
    """The command line, and without ACPI the virtio-mmio devices: Linux learns of them by it alone."""
    if platform.acpi:
        return command_line
    slots = (virtio_mmio_slot(slot) for slot in platform.virtio_mmio)
    devices = [f"virtio_mmio.device={VIRTIO_MMIO_SIZE}@{address:#x}:{gsi}" for address, gsi in slots]
    return " ".join(filter(None, (command_line, *devices)))


def _place_tables(ram: Placement, platform: Platform) -> int:
    """Put tables and the reset vector into RAM. Returns the address of the RSDP; 0 if there are no ACPI tables."""
    ram.place(low_memory.MP_TABLES, mp_tables(platform, low_memory.MP_TABLES), "the MP tables")
    ram.place(low_memory.RESET_VECTOR, RESET_CODE, "the reset vector")
    if not platform.acpi:
        return 0
    ram.place(low_memory.ACPI_TABLES, acpi_tables(platform, low_memory.ACPI_TABLES, ram.size), "the ACPI tables")
    return low_memory.ACPI_TABLES
