"""Multiboot kernels and flat binaries."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from viaduct._core import GuestMemory
from viaduct.vmm.boot import BootError, CpuState, load
from viaduct.vmm.memory_map import MIB

from .kernel_files import CODE, Elf, ElfSegment, guest_memory, multiboot, text


def started(tmp_path: Path, kernel: bytes, memory: GuestMemory, **options: object) -> CpuState:
    path = tmp_path / "kernel"
    path.write_bytes(kernel)
    return load(memory, path, **options)  # type: ignore[arg-type]


def check_multiboot_information(memory: GuestMemory, state: CpuState, modules: int) -> None:
    assert state.rax == 0x2BAD_B002
    assert (state.cr0 & 0x8000_0001, state.rflags & 1 << 9, state.cs.db) == (1, 0, 1)
    fields = struct.unpack("<18I", memory.read(state.rbx, 72))
    flags, lower, upper, _, line, count, module = fields[:7]
    assert flags == (0x245 | (8 if modules else 0))
    assert (lower, upper) == (639, 15 * 1024)
    assert text(memory, line) == b"one two"
    assert count == modules
    if modules:
        start, end = struct.unpack("<2I", memory.read(module, 8))
        assert memory.read(start, end - start) == b"module"
        assert start % 4096 == 0
    length, entries = fields[11:13]
    table, place = [], entries
    while place < entries + length:
        size, start, extent, kind = struct.unpack("<I2QI", memory.read(place, 24))
        table.append((start, extent, kind))
        place += size + 4
    assert table[:3] == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, 15 * MIB, 1)]
    assert text(memory, fields[16]) == b"viaduct"


def test_multiboot_by_addresses(tmp_path: Path) -> None:
    memory = guest_memory()
    body = CODE[:64] + multiboot(0x1_0003, (0x10_0040, 0x10_0000, 0x10_0800, 0x10_2000, 0x10_0100))
    (tmp_path / "module").write_bytes(b"module")
    kernel = body.ljust(0x900, b"\x90")
    state = started(tmp_path, kernel, memory, command_line="one two", initrd=tmp_path / "module")
    assert state.rip == 0x10_0100
    assert memory.read(0x10_0000, 0x2000) == kernel[:0x800].ljust(0x2000, b"\0")
    check_multiboot_information(memory, state, modules=1)


def test_multiboot_by_elf(tmp_path: Path) -> None:
    memory = guest_memory()
    kernel = Elf([ElfSegment(0x10_0000, multiboot(0) + CODE)], entry=0x10_000C, bits=32, machine=3)
    state = started(tmp_path, kernel.bytes(), memory, command_line="one two")
    assert state.rip == 0x10_000C
    assert memory.read(0x10_000C, len(CODE)) == CODE
    check_multiboot_information(memory, state, modules=0)


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (multiboot(0x4).ljust(4096, b"\0"), "asks for features 0x4"),
        (multiboot(0).ljust(4096, b"\0"), "has no addresses"),
        (multiboot(0x1_0000, (0x10_0000, 0x10_0000, 0x20_0000, 0, 0x10_0000)), "speaks of 1048576"),
        (multiboot(0x1_0000, (0x10_0000, 0x10_0020, 0, 0, 0x10_0000)), "do not go together"),
        (multiboot(0x1_0000, (0x10_0000, 0x10_0000, 0, 0, 0x20_0000)), "do not go together"),
        (multiboot(0x1_0000, (0x10_0000, 0x10_0000, 0, 0xFFFF_FFFF, 0x10_0000)), "but RAM is at"),
        (
            multiboot(0x1_0000, (0x7000, 0x7000, 0, 0xA_0000, 0x7000)),
            "kernel: the command line belongs at .* belongs to the kernel",
        ),
        (Elf([ElfSegment(0x10_0000, multiboot(0) + CODE)], entry=0x10_000C).bytes(), "for x86-64"),
    ],
    ids=["features", "no addresses", "truncated", "header outside", "entry outside", "bss", "overlap", "64 bits"],
)
def test_refused_multiboot_kernels(tmp_path: Path, kernel: bytes, found: str) -> None:
    with pytest.raises(BootError, match=found):
        started(tmp_path, kernel, guest_memory(), boot="multiboot")


def test_a_wrong_checksum_is_no_multiboot_header(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="no multiboot header"):
        started(tmp_path, multiboot(0, checksum=1), guest_memory(), boot="multiboot")


@pytest.mark.parametrize(
    ("boot", "selector", "base", "offset"),
    [("flat", 0, 0, 0x7C00), ("flat:0x500", 0, 0, 0x500), ("flat:65536", 0x1000, 0x1_0000, 0)],
)
def test_flat(tmp_path: Path, boot: str, selector: int, base: int, offset: int) -> None:
    memory = guest_memory(MIB)
    state = started(tmp_path, CODE, memory, boot=boot)
    assert (state.cs.selector, state.cs.base, state.rip) == (selector, base, offset)
    assert (state.data.selector, state.data.base, state.cs.limit) == (selector, base, 0xFFFF)
    assert (state.cr0 & 1, state.rdx, state.idt) == (0, 0x80, (0, 0x3FF))
    everything = memory.read(0, MIB)
    assert everything == bytes(base + offset) + CODE + bytes(MIB - base - offset - len(CODE)), "nothing else is there"


@pytest.mark.parametrize(
    ("boot", "options", "found"),
    [
        ("flat:0x100000", {}, "cannot be reached"),
        ("flat:-1", {}, "cannot be reached"),
        ("flat:0x10001", {}, "cannot be reached"),
        ("flat:here", {}, "has no address"),
        ("flat:0xff000", {}, "but RAM is at"),
        ("flat", {"command_line": "quiet"}, "--append quiet: a flat binary cannot take it"),
        ("flat", {"initrd": "file"}, "--initrd file: a flat binary cannot take it"),
        ("pvh:1", {}, "is no way of booting"),
        ("efi", {}, "allowed: auto, bzimage, pvh, linux, multiboot, flat"),
    ],
)
def test_refused_flat_binaries(tmp_path: Path, boot: str, options: dict[str, object], found: str) -> None:
    with pytest.raises(BootError, match=found):
        started(tmp_path, CODE * 3, guest_memory(MIB), boot=boot, **options)
