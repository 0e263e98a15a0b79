"""PVH: the start info is what Xen's start_info.h describes, the vCPU's state what pvh.pandoc does."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from viaduct.vmm.boot import BootError, Platform, load

from .kernel_files import CODE, Elf, ElfSegment, guest_memory, pvh_note, text


@pytest.mark.parametrize(("bits", "machine"), [(64, 62), (32, 3)])
def test_pvh(tmp_path: Path, bits: int, machine: int) -> None:
    kernel, initrd, memory = tmp_path / "vmlinux", tmp_path / "initrd", guest_memory()
    segments = [ElfSegment(0x20_0000, CODE), pvh_note(0x20_0100)]
    kernel.write_bytes(Elf(segments, bits=bits, machine=machine).bytes())
    initrd.write_bytes(b"archive")
    state = load(memory, kernel, initrd=initrd, command_line="quiet", platform=Platform(pci=False))
    assert state.rip == 0x20_0100
    assert state.cr0 & 0x8000_0001 == 1, "protected mode without paging"
    assert (state.cr4, state.efer) == (0, 0)
    assert state.rflags & (1 << 8 | 1 << 9 | 1 << 17) == 0
    assert (state.cs.type & 8, state.cs.db, state.cs.l, state.cs.base, state.cs.limit) == (8, 1, 0, 0, 0xFFFF_FFFF)
    assert (state.data.type & 2, state.data.base, state.data.limit) == (2, 0, 0xFFFF_FFFF)
    assert (state.tr.base, state.tr.limit, state.tr.type) == (0, 0x67, 0xB)

    magic, version, flags, modules, module, line, rsdp, entries, count, _ = struct.unpack(
        "<4I4Q2I", memory.read(state.rbx, 56)
    )
    assert (magic, version, flags, modules, count) == (0x336E_C578, 1, 0, 1, 3)
    assert text(memory, line) == b"quiet"
    assert memory.read(rsdp, 8) == b"RSD PTR "
    address, size, _, _ = struct.unpack("<4Q", memory.read(module, 32))
    assert memory.read(address, size) == b"archive"
    table = [struct.unpack("<2Q2I", memory.read(entries + 24 * index, 24))[:3] for index in range(count)]
    assert table == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (0x10_0000, 0xF0_0000, 1)]


def test_without_an_initrd_there_is_no_module(tmp_path: Path) -> None:
    kernel, memory = tmp_path / "vmlinux", guest_memory()
    kernel.write_bytes(Elf([ElfSegment(0x20_0000, CODE), pvh_note(0x20_0000)]).bytes())
    state = load(memory, kernel)
    assert struct.unpack("<IQ", memory.read(state.rbx + 12, 12)) == (0, 0)


def test_a_kernel_without_the_note_is_refused_by_name(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(Elf().bytes())
    with pytest.raises(BootError, match=r"vmlinux: has no entry point for PVH .*--boot linux"):
        load(guest_memory(), kernel, boot="pvh")
