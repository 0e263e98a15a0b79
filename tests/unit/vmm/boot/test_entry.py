"""Small kernels entered on this host's KVM: the vCPU takes the state, and is in the mode that the protocol promises."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from viaduct._core import Vm
from viaduct.vmm.boot import load
from viaduct.vmm.memory_map import RESET_PORT
from vmm.flat import CODE_16, SEGMENT_16, Registers, until

from .kernel_files import BzImage, Elf, ElfSegment, guest_memory, multiboot, pvh_note

PORT = 0x10
HLT = b"\xf4"
OUT_AL, OUT_EAX = bytes([0xE6, PORT]), bytes([0xE7, PORT])  # out imm8, al; out imm8, eax


def told(tmp_path: Path, kernel: bytes, **options: object) -> list[bytes]:
    """What a kernel writes to the port until it halts."""
    path = tmp_path / "kernel"
    path.write_bytes(kernel)
    memory, device, ends = guest_memory(), Registers(), list[str]()
    state = load(memory, path, **options)  # type: ignore[arg-type]
    vm = Vm("kvm", memory, 1, interrupts="none", on_event=lambda kind, detail: ends.append(kind))
    try:
        vm.set_registers(0, state.registers())
        vm.add_pio(PORT, 4, device)
        vm.start()
        until(lambda: bool(ends))
        assert ends == ["halted"]
    finally:
        vm.close()
    return [data for _, data in device.writes]


LONG_MODE = b"".join(
    (
        b"\x8b\x86\x02\x02\x00\x00",  # mov eax, [rsi + 0x202]: the header's magic
        OUT_EAX,
        b"\x8b\x9e\x28\x02\x00\x00",  # mov ebx, [rsi + 0x228]: the command line
        b"\x8b\x03",  # mov eax, [rbx]
        OUT_EAX,
        b"\x48\xb8" + struct.pack("<Q", 0x1122_3344_5566_7788),  # mov rax: in 64-bit mode only
        b"\x48\xc1\xe8\x20",  # shr rax, 32
        OUT_EAX,
        HLT,
    )
)
PROTECTED_MODE = b"".join(
    (
        b"\x8b\x03",  # mov eax, [ebx]: the first word of what the loader tells
        OUT_EAX,
        b"\xb8" + struct.pack("<I", 0x1122_3344),  # mov eax: in 32-bit mode
        OUT_EAX,
        HLT,
    )
)


@pytest.mark.parametrize("kind", ["bzimage", "linux"])
def test_linux_is_entered_in_long_mode(tmp_path: Path, kind: str) -> None:
    if kind == "bzimage":
        kernel = BzImage(code=HLT * 0x200 + LONG_MODE).bytes()
    else:
        kernel = Elf([ElfSegment(0x20_0000, LONG_MODE)]).bytes()
    expected = [b"HdrS", b"loop", struct.pack("<I", 0x1122_3344)]
    assert told(tmp_path, kernel, boot=kind, command_line="loop=1") == expected


def test_pvh_is_entered_in_protected_mode(tmp_path: Path) -> None:
    kernel = Elf([ElfSegment(0x20_0000, PROTECTED_MODE), pvh_note(0x20_0000)]).bytes()
    assert told(tmp_path, kernel) == [struct.pack("<I", 0x336E_C578), struct.pack("<I", 0x1122_3344)]


def test_multiboot_is_entered_in_protected_mode_with_its_magic(tmp_path: Path) -> None:
    header = multiboot(0x1_0000, (0x10_0000, 0x10_0000, 0, 0, 0x10_0020))
    magic, flags, _ = told(tmp_path, header + OUT_EAX + PROTECTED_MODE)
    assert magic == struct.pack("<I", 0x2BAD_B002)
    assert flags == struct.pack("<I", 0x245)


@pytest.mark.parametrize("boot", ["flat", "flat:0x20000"])
def test_a_boot_sector_says_hello(tmp_path: Path, boot: str) -> None:
    """In real mode, with its data reached as it was linked: at its offset in the segment."""
    code_size, origin = 13, 0x7C00 if boot == "flat" else 0
    code = b"".join(
        (
            b"\xbe" + struct.pack("<H", origin + code_size),  # mov si, message
            b"\xac",  # next: lodsb
            b"\x84\xc0",  # test al, al
            b"\x74\x04",  # jz end
            OUT_AL,
            b"\xeb\xf7",  # jmp next
            HLT,  # end:
        )
    )
    assert b"".join(told(tmp_path, code + b"Hello\0", boot=boot)) == b"Hello"


def test_the_reset_vector_resets(tmp_path: Path) -> None:
    """Who jumps to F000:FFF0 in real mode, as to a BIOS, finds the way to the reset control."""
    path = tmp_path / "kernel"
    path.write_bytes(multiboot(0x1_0000, (0x10_0000, 0x10_0000, 0, 0, 0x10_0020)).ljust(0x20, b"\0") + HLT)
    memory, device, ends = guest_memory(), Registers(), list[str]()
    load(memory, path)
    vm = Vm("kvm", memory, 1, interrupts="none", on_event=lambda kind, detail: ends.append(kind))
    try:
        segments: dict[str, object] = {name: SEGMENT_16 for name in ("ds", "es", "ss", "fs", "gs")}
        cs = (0xF000, 0xF_0000, *CODE_16[2:])
        vm.set_registers(0, segments | {"cs": cs, "rip": 0xFFF0, "rsp": 0x1000, "rflags": 2})
        vm.add_pio(RESET_PORT, 1, device)
        vm.start()
        until(lambda: bool(ends))
        assert ends == ["halted"]
        assert device.writes == [(0, b"\x06")]
    finally:
        vm.close()
