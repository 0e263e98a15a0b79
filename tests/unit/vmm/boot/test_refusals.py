"""What is no kernel, or does not fit, is refused with an error that names it, what was found, and what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from viaduct.vmm.boot import BootError, load
from viaduct.vmm.memory_map import MIB

from .kernel_files import CODE, BzImage, Elf, ElfSegment, guest_memory, pvh_note

NO_KERNELS = {
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "is packed with gzip; unpack it (zcat), and if it is an initrd"),
    "xz": (b"\xfd7zXZ\0" + bytes(600), "is packed with xz"),
    "cpio": (b"070701" + bytes(600), "is a cpio archive; name it with --initrd"),
    "qcow2": (b"QFI\xfb" + bytes(600), "is a disk image of QEMU (qcow2); name it with --disk"),
    "ARM64": (bytes(0x38) + b"ARM\x64" + bytes(600), "is a kernel for ARM64; use one for x86-64"),
    "ARM": (bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(600), "is a kernel for ARM; use one for x86-64"),
    "EFI": (b"MZ" + bytes(600), "is a program for EFI; use a bzImage"),
    "script": (b"#!/bin/sh\n", "is a script; name a kernel"),
    "boot sector": (bytes(510) + b"\x55\xaa", "is a boot sector or a disk image; --boot flat"),
    "noise": (b"\x01\x02" + bytes(600), "begins with 01 02 00 00 00 00 00 00 and is no kernel that is known here"),
    "short": (b"x", "begins with 78 and is no kernel that is known here"),
    "ELF for ARM64": (Elf(machine=183).bytes(), "is a program for ARM64"),
    "ELF for something": (Elf(machine=999).bytes(), "is a program for machine 999"),
    "program": (Elf([ElfSegment(0, b"/lib/ld.so", type=3)]).bytes(), "is a program for an operating system, no kernel"),
    "object file": (Elf(type=1).bytes(), "is an ELF file of type 1, no executable"),
    "big endian": (Elf(order=2).bytes(), "is an ELF file of class 2 and byte order 2"),
    "core of nothing": (Elf([]).bytes(), "has no segment to load"),
    "32-bit vmlinux": (Elf(bits=32, machine=3).bytes(), "is a 32-bit kernel"),
    "old bzImage": (BzImage(version=0x20B).bytes(), "speaks version 2.11 of the boot protocol"),
    "32-bit bzImage": (BzImage(xloadflags=0).bytes(), "has no 64-bit entry"),
    "zImage": (BzImage(loadflags=0).bytes(), "is a zImage"),
    "truncated bzImage": (BzImage().bytes()[:-16], "it is truncated or damaged"),
    "empty bzImage": (BzImage(syssize=0).bytes(), "it is truncated or damaged"),
    "header of a bzImage": (BzImage().bytes()[:0x220], "ends at 544 bytes, inside the setup header"),
    "odd alignment": (BzImage(kernel_alignment=0x30_0000).bytes(), "wants to be aligned to 0x300000 bytes"),
    "no alignment": (BzImage(kernel_alignment=0).bytes(), "wants to be aligned to 0x0 bytes"),
    "truncated vmlinux": (Elf().bytes()[:-1], "inside the segment of program header 0"),
    "header of a vmlinux": (Elf().bytes()[:30], "inside the ELF header"),
    "program headers cut off": (Elf().bytes()[:100], "inside the program headers"),
    "entry outside": (Elf(entry=0x10).bytes(), "its entry point 0x10 is in none of its segments"),
    "many headers": (Elf(count=65535).bytes(), "has 65535 program headers"),
    "wide headers": (Elf(header_size=57).bytes(), "has program headers of 57 bytes"),
}
LARGE = {
    "overlapping segments": [ElfSegment(0x20_0000, CODE), ElfSegment(0x20_0010, CODE)],
    "over the command line": [ElfSegment(0x20_0000, CODE), ElfSegment(0x2_0000, CODE)],
    "over the GDT": [ElfSegment(0x20_0000, CODE), ElfSegment(0x400, CODE)],
    "beyond RAM": [ElfSegment(0x20_0000, CODE), ElfSegment(0xFFFF_FFFF_FFFF_F000, CODE)],
    "huge in memory": [ElfSegment(0x20_0000, CODE, memory_size=1 << 62)],
    "huge in the file": [ElfSegment(0x20_0000, CODE, memory_size=1 << 63, file_size=1 << 62)],
    "offset that overflows": [ElfSegment(0x20_0000, CODE, offset=(1 << 64) - 8)],
    "shrinking": [ElfSegment(0x20_0000, CODE, memory_size=8)],
}


@pytest.mark.parametrize(("content", "found"), NO_KERNELS.values(), ids=NO_KERNELS)
def test_no_kernel(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    with pytest.raises(BootError, match=re.escape(found)) as error:
        load(guest_memory(), path)
    assert str(error.value).startswith(f"--kernel {path}: ")


@pytest.mark.parametrize("boot", ["linux", "pvh"])
@pytest.mark.parametrize("segments", LARGE.values(), ids=LARGE)
def test_hostile_segments(tmp_path: Path, segments: list[ElfSegment], boot: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(Elf([*segments, pvh_note(0x20_0000)]).bytes())
    with pytest.raises(BootError, match=r"belongs to|but RAM is at|is truncated|a segment cannot shrink"):
        load(guest_memory(), path, boot=boot)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    pipe, empty = tmp_path / "pipe", tmp_path / "empty"
    os.mkfifo(pipe)
    empty.touch()
    for path, found in (
        (tmp_path / "missing", "no such file"),
        (tmp_path, "is a directory"),
        (pipe, "is a pipe"),
        (Path("/dev/zero"), "is a character device"),
        (empty, "is an empty file"),
        (tmp_path / "empty" / "below", "cannot be opened: Not a directory"),
    ):
        with pytest.raises(BootError, match=found) as error:
            load(guest_memory(), path)
        assert error.value.subject == f"--kernel {path}"


def test_a_protocol_that_the_file_does_not_speak(tmp_path: Path) -> None:
    elf, image = tmp_path / "vmlinux", tmp_path / "vmlinuz"
    elf.write_bytes(Elf().bytes())
    image.write_bytes(BzImage(payload=b"nothing that is known").bytes())
    for path, boot, found in (
        (elf, "bzimage", "is an ELF file, no bzImage; take --boot auto, pvh or linux"),
        (elf, "multiboot", "has no multiboot header"),
        (image, "multiboot", "has no multiboot header"),
        (image, "pvh", "has a payload of unknown packing"),
    ):
        with pytest.raises(BootError, match=found):
            load(guest_memory(), path, boot=boot)


@pytest.mark.parametrize(
    ("payload", "length", "found"),
    [
        (b"\x1f\x8b\x08\0garbage", None, "its packed kernel is damaged"),
        (b"\xfd7zXZ\0garbage", None, "its packed kernel is damaged"),
        (b"BZh9garbage", None, "its packed kernel is damaged"),
        (b"\x1f\x8b", 1 << 31, "has a payload of 2147483648 bytes"),
        (b"\x1f\x8b", 1 << 20, "inside the packed kernel"),
    ],
)
def test_a_damaged_payload(tmp_path: Path, payload: bytes, length: int | None, found: str) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(BzImage(payload=payload, payload_length=length).bytes())
    with pytest.raises(BootError, match=found):
        load(guest_memory(), path, boot="pvh")


@pytest.mark.parametrize(
    ("memory", "kernel", "found"),
    [
        (MIB, BzImage(), "kernels need at least 2 MiB"),
        (4 * MIB, BzImage(init_size=0x1000_0000), r"give the machine more memory \(--memory\): at least 258M"),
        (4 * MIB, BzImage(pref_address=0x100_0000, relocatable_kernel=0), "but RAM is at 0x0 to 0x400000"),
    ],
)
def test_too_little_memory(tmp_path: Path, memory: int, kernel: BzImage, found: str) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(kernel.bytes())
    with pytest.raises(BootError, match=found):
        load(guest_memory(memory), path)


@pytest.mark.parametrize("kernel", [BzImage().bytes(), Elf().bytes()], ids=["bzimage", "vmlinux"])
def test_an_initrd_that_does_not_fit(tmp_path: Path, kernel: bytes) -> None:
    path, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    path.write_bytes(kernel)
    initrd.write_bytes(b"")
    os.truncate(initrd, 1 << 40)  # a hole: not read
    with pytest.raises(BootError, match=r"has 1099511627776 bytes, and between .* there is no room for it") as error:
        load(guest_memory(), path, initrd=initrd)
    assert error.value.subject == f"--initrd {initrd}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("x" * 201, "has 201 bytes, and .* takes 200"),
        ("ä" * 101, "has 202 bytes"),
        ("a\0b", "has a zero byte inside"),
    ],
)
def test_command_lines_that_cannot_be(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(BzImage(cmdline_size=200).bytes())
    with pytest.raises(BootError, match=found) as error:
        load(guest_memory(), path, command_line=line)
    assert error.value.subject == "--append"
    load(guest_memory(), path, command_line="x" * 200)
