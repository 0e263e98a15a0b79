"""Linux by its own two entries: the zero page says what boot.rst and zero-page.rst want of it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from pathlib import Path

import pytest

from viaduct._core import GuestMemory
from viaduct.vmm.boot import BootError, CpuState, Platform, load
from viaduct.vmm.memory_map import GIB, MIB

from .kernel_files import CODE, BzImage, Elf, ElfSegment, guest_memory, pvh_note, text


def started(tmp_path: Path, kernel: bytes, memory: GuestMemory, **options: object) -> CpuState:
    path = tmp_path / "kernel"
    path.write_bytes(kernel)
    return load(memory, path, **options)  # type: ignore[arg-type]


def u32(page: bytes, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 4], "little")


def u64(page: bytes, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 8], "little")


def e820(page: bytes) -> list[tuple[int, int, int]]:
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]


def walk(memory: GuestMemory, cr3: int, address: int) -> int:
    """What a linear address is translated to (Intel SDM 3, 4.5)."""
    for shift in (39, 30, 21):
        entry = u64(memory.read(cr3 + 8 * (address >> shift & 511), 8), 0)
        assert entry & 1, f"{address:#x} is not mapped"
        cr3 = entry & 0xF_FFFF_FFFF_F000
    assert entry & 1 << 7, "a large page"
    return cr3 + (address & (1 << 21) - 1)


def test_bzimage_is_entered_in_long_mode_at_its_64_bit_entry(tmp_path: Path) -> None:
    memory = guest_memory()
    state = started(tmp_path, BzImage().bytes(), memory)
    assert state.rip == 0x20_0200
    assert memory.read(0x20_0000, len(CODE)) == CODE
    assert state.efer == 0x500
    assert state.cr0 & 0x8000_0001 == 0x8000_0001
    assert state.cr4 == 0x20
    assert not state.rflags & 1 << 9, "no interrupts"
    assert (state.cs.selector, state.cs.l, state.cs.db) == (0x10, 1, 0)
    assert state.data.selector == 0x18
    for address in (0, state.rip, state.rsi, 0xFFFF_FFFF):
        assert walk(memory, state.cr3, address) == address
    descriptors = struct.unpack("<6Q", memory.read(state.gdt.base, state.gdt.limit + 1))
    assert descriptors[2] == 0x00AF_9B00_0000_FFFF  # what Linux's own boot code loads: GDT_ENTRY_BOOT_CS
    assert descriptors[3] == 0x00CF_9300_0000_FFFF


def test_registers_are_what_an_engine_takes(tmp_path: Path) -> None:
    registers = started(tmp_path, BzImage().bytes(), guest_memory()).registers()
    assert registers["cs"] == (0x10, 0, 0xFFFF_FFFF, 0xB, 0, 1, 1, 0, 1, 1)
    assert registers["ss"] == registers["gs"] == (0x18, 0, 0xFFFF_FFFF, 0x3, 0, 1, 0, 1, 1, 1)
    assert registers["gdt"] == (0x500, 47)
    assert " ".join(sorted(registers)) == (
        "cr0 cr3 cr4 cs ds efer es fs gdt gs idt ldt "
        "r10 r11 r12 r13 r14 r15 r8 r9 rax rbp rbx rcx rdi rdx rflags rip rsi rsp ss tr"
    )


def test_zero_page_has_the_kernels_header_and_what_the_loader_adds(tmp_path: Path) -> None:
    memory = guest_memory()
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"070701" + bytes(5000))
    kernel = BzImage()
    state = started(tmp_path, kernel.bytes(), memory, initrd=initrd, command_line="console=ttyS0 ä")
    page = memory.read(state.rsi, 4096)
    assert page[0x1F1:0x210] == kernel.bytes()[0x1F1:0x210]
    assert page[0x210] == 0xFF, "an unknown loader"
    assert u32(page, 0x214) == 0x20_0000
    assert text(memory, u32(page, 0x228)).decode() == "console=ttyS0 ä"
    address, size = u32(page, 0x218), u32(page, 0x21C)
    assert memory.read(address, size) == initrd.read_bytes()
    assert (address % 4096, address + size <= 16 * MIB) == (0, True)
    assert memory.read(u64(page, 0x70), 8) == b"RSD PTR "
    assert page[0x1EF] == 0, "the sentinel: this zero page was cleared"
    following, kind, length = struct.unpack("<QII", memory.read(u64(page, 0x250), 16))
    assert (following, kind, length) == (0, 9, 32), "a seed for random numbers"


def test_two_starts_have_different_seeds(tmp_path: Path) -> None:
    seeds = set()
    for _ in range(2):
        memory = guest_memory()
        page = memory.read(started(tmp_path, BzImage().bytes(), memory).rsi, 4096)
        seeds.add(memory.read(u64(page, 0x250) + 16, 32))
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (16 * MIB, [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 15 * MIB, 1)]),
        (3 * GIB, [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 3 * GIB - MIB, 1)]),
        (5 * GIB, [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 3 * GIB - MIB, 1), (4 * GIB, 2 * GIB, 1)]),
    ],
)
def test_memory_map(tmp_path: Path, size: int, expected: list[tuple[int, int, int]]) -> None:
    memory = guest_memory(size)
    state = started(tmp_path, BzImage().bytes(), memory, platform=Platform(pci=False))
    assert e820(memory.read(state.rsi, 4096)) == expected
    state = started(tmp_path, BzImage().bytes(), memory)
    assert sorted([*expected, (0xE000_0000, 256 * MIB, 2)]) == e820(memory.read(state.rsi, 4096))


def test_initrd_stays_below_the_kernels_limit(tmp_path: Path) -> None:
    memory = guest_memory(64 * MIB)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"i" * 4097)
    state = started(tmp_path, BzImage(initrd_addr_max=0x1FF_FFFF).bytes(), memory, initrd=initrd)
    assert u32(memory.read(state.rsi, 4096), 0x218) == 0x200_0000 - 8192


@pytest.mark.parametrize(
    ("kernel", "address"),
    [
        (BzImage(pref_address=0x40_0000), 0x40_0000),
        (BzImage(pref_address=0x100_0000, init_size=0x100_0000, kernel_alignment=0x40_0000), 0x40_0000),
        (BzImage(init_size=0x3E_0000, kernel_alignment=0x100_0000, min_alignment=16), 0x10_0000),
        (BzImage(pref_address=0, relocatable_kernel=0), 0x10_0000),
    ],
    ids=["preferred", "moved", "moved, less aligned", "fixed"],
)
def test_where_the_kernel_goes(tmp_path: Path, kernel: BzImage, address: int) -> None:
    memory = guest_memory(0x50_0000 if kernel.kernel_alignment == 0x100_0000 else 24 * MIB)
    assert started(tmp_path, kernel.bytes(), memory).rip == address + 0x200
    assert memory.read(address, len(CODE)) == CODE


def test_setup_sects_of_zero_means_four(tmp_path: Path) -> None:
    memory = guest_memory()
    started(tmp_path, BzImage(setup_sects=0).bytes(), memory)
    assert memory.read(0x20_0000, len(CODE)) == CODE


def test_without_acpi_linux_learns_of_virtio_mmio_by_its_command_line(tmp_path: Path) -> None:
    memory = guest_memory()
    platform = Platform(acpi=False, virtio_mmio=(0, 3))
    state = started(tmp_path, BzImage().bytes(), memory, command_line="quiet", platform=platform)
    page = memory.read(state.rsi, 4096)
    expected = b"quiet virtio_mmio.device=512@0xfeb00000:16 virtio_mmio.device=512@0xfeb03000:19"
    assert text(memory, u32(page, 0x228)) == expected
    assert u64(page, 0x70) == 0, "no RSDP"
    assert memory.read(0xE_0000, 0x1_0000) == bytes(0x1_0000)


def test_vmlinux_is_entered_at_its_entry_with_a_zero_page(tmp_path: Path) -> None:
    memory = guest_memory()
    kernel = Elf([ElfSegment(0x20_0000, CODE), ElfSegment(0x40_0000, CODE, memory_size=0x2000)], entry=0x20_0010)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"archive")
    state = started(tmp_path, kernel.bytes(), memory, command_line="root=/dev/vda", initrd=initrd)
    assert state.rip == 0x20_0010
    assert state.efer == 0x500
    assert memory.read(0x20_0000, len(CODE)) == CODE
    assert memory.read(0x40_0000, 0x2000) == CODE.ljust(0x2000, b"\0")
    page = memory.read(state.rsi, 4096)
    assert (page[0x1FE:0x200], page[0x202:0x206]) == (b"\x55\xaa", b"HdrS")
    assert text(memory, u32(page, 0x228)) == b"root=/dev/vda"
    assert memory.read(u32(page, 0x218), u32(page, 0x21C)) == b"archive"
    assert e820(page)[0] == (0, 0x9FC00, 1)


@pytest.mark.parametrize(
    "packed",
    [
        lambda data: gzip.compress(data),
        lambda data: bz2.compress(data) + struct.pack("<I", len(data)),
        lambda data: lzma.compress(data) + struct.pack("<I", len(data)),
        lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + struct.pack("<I", len(data)),
        lambda data: data,
    ],
    ids=["gzip", "bzip2", "xz", "lzma", "plain"],
)
@pytest.mark.parametrize("boot", ["linux", "pvh"])
def test_the_kernel_inside_a_bzimage_is_unpacked(tmp_path: Path, packed: object, boot: str) -> None:
    assert callable(packed)
    kernel = Elf([ElfSegment(0x30_0000, CODE), pvh_note(0x30_0020)], entry=0x30_0010).bytes()
    memory = guest_memory()
    state = started(tmp_path, BzImage(payload=packed(kernel)).bytes(), memory, boot=boot)
    assert state.rip == {"linux": 0x30_0010, "pvh": 0x30_0020}[boot]
    assert memory.read(0x30_0000, len(CODE)) == CODE


def test_a_packed_kernel_larger_than_ram_is_not_unpacked(tmp_path: Path) -> None:
    image = BzImage(payload=gzip.compress(bytes(40 * MIB))).bytes()
    with pytest.raises(BootError, match="unpacks to more than the 16777216 bytes of RAM"):
        started(tmp_path, image, guest_memory(), boot="pvh")
