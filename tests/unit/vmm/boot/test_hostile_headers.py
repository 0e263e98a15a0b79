"""Kernels whose headers anybody changed anyhow: refused with a `BootError` or started, and nothing else ever happens.

A write outside of RAM would be a ValueError of the guest's memory, and fail the test.
"""

from __future__ import annotations

import gzip
import tempfile
import tracemalloc
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from viaduct.vmm.boot import PROTOCOLS, BootError, Platform, load
from viaduct.vmm.memory_map import MIB

from .kernel_files import CODE, BzImage, Elf, ElfSegment, guest_memory, multiboot, pvh_note

ELF = Elf([ElfSegment(0x20_0000, CODE, memory_size=0x3000), ElfSegment(0x30_0000, CODE), pvh_note(0x20_0000)])
SEEDS = (
    (BzImage().bytes(), range(0x1F1, 0x26C)),
    (BzImage(payload=gzip.compress(ELF.bytes())).bytes(), range(0x1F1, 0x26C)),
    (ELF.bytes(), range(0, 64 + 3 * 56)),
    (ELF.bytes(), range(4096 + 2 * len(CODE), 4096 + 2 * len(CODE) + 40)),
    (Elf([ElfSegment(0x10_0000, multiboot(0) + CODE)], 0x10_0010, bits=32, machine=3).bytes(), range(0, 84)),
    (multiboot(0x1_0000, (0x10_0000, 0x10_0000, 0x10_1000, 0x10_2000, 0x10_0020)).ljust(0x1000, b"\0"), range(12, 32)),
)
INTERESTING = st.sampled_from(
    [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1]
)
ALLOCATED_MAX = 12 * MIB


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content, places = draw(st.sampled_from(SEEDS))
    file = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(places))
        size = draw(st.sampled_from([1, 2, 4, 8]))
        value = draw(st.one_of(INTERESTING, st.integers(0, 255), st.integers(0, (1 << 64) - 1)))
        file[place : place + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(file[: draw(st.one_of(st.just(len(file)), st.integers(1, len(file))))])


@given(damaged(), st.sampled_from(PROTOCOLS), st.booleans(), st.booleans())
def test_hostile_headers(kernel: bytes, boot: str, with_initrd: bool, acpi: bool) -> None:
    memory = guest_memory(8 * MIB)
    with tempfile.TemporaryDirectory() as directory:
        path, initrd = Path(directory, "kernel"), Path(directory, "initrd")
        path.write_bytes(kernel)
        initrd.write_bytes(bytes(5000))
        tracemalloc.start()
        try:
            state = load(
                memory, path, boot=boot, initrd=initrd if with_initrd else None, platform=Platform(acpi=acpi, vcpus=4)
            )
            rip = state.rip
        except BootError:
            rip = 0
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert 0 <= rip < 8 * MIB
    assert most < ALLOCATED_MAX
