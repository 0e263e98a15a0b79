"""What the loader hands to a kernel, seen by tools that know nothing of it: ACPICA's compiler and interpreter, readelf.

And Debian's kernel, as it is packaged, by each way of booting that it has.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from vmm.boot.kernel_files import guest_memory

from viaduct.qemu.linux_image import cache_directory
from viaduct.qemu.linux_kernel import downloaded_kernel, installed_kernel
from viaduct.vmm.boot import Platform, load
from viaduct.vmm.memory_map import GIB, MIB

ACPI_TABLES = 0xE_0000
PLATFORMS = {
    "everything": (Platform(vcpus=64, virtio_mmio=tuple(range(8)), i8042=True), GIB),
    "nothing": (Platform(pci=False, serial=False, rtc=False, pvpanic=False), 64 * MIB),
    "x2APIC": (Platform(vcpus=300), 32 * GIB),
}


def run(*command: str | Path, cwd: Path | None = None, stdin: str = "") -> str:
    """What a tool prints; the test fails if the tool does, or is not there."""
    if shutil.which(str(command[0])) is None:
        pytest.fail(f"no {command[0]} here: apt-get install acpica-tools binutils")
    done = subprocess.run([*command], cwd=cwd, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def debian_kernel() -> Path:
    """The distribution's kernel as it is packaged, a bzImage: the installed one, or one that is downloaded once."""
    if (version := installed_kernel()) is not None:
        return Path(f"/boot/vmlinuz-{version}")
    kept = cache_directory() / "vmlinuz"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="making-") as scratch:
            next((downloaded_kernel(Path(scratch)) / "boot").glob("vmlinuz-*")).rename(kept)
    return kept


@pytest.fixture(params=list(PLATFORMS.values()), ids=list(PLATFORMS))
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """The tables of a machine as files, found in its memory as a kernel finds them."""
    platform, ram_size = request.param
    kernel = tmp_path / "kernel"
    kernel.write_bytes(struct.pack("<8I", 0x1BAD_B002, 0x1_0000, 0xE451_4FFE, *[0x20_0000] * 2, 0, 0, 0x20_0000))
    memory = guest_memory(ram_size)
    load(memory, kernel, platform=platform)
    found: dict[str, Path] = {}

    def save(address: int) -> bytes:
        (length,) = struct.unpack("<I", memory.read(address + 4, 4))
        table = memory.read(address, length)
        name = table[:4].decode()
        found[name] = tmp_path / f"{name.lower()}.dat"
        found[name].write_bytes(table)
        return table

    for address in struct.unpack("<Q", memory.read(ACPI_TABLES + 24, 8)):
        xsdt = save(address)
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        table = save(address)
        if table[:4] == b"FACP":
            save(struct.unpack_from("<Q", table, 140)[0])
    return found


def test_iasl_finds_nothing_wrong_with_the_tables(tables: dict[str, Path], tmp_path: Path) -> None:
    assert {"XSDT", "FACP", "APIC", "DSDT"} <= set(tables)
    for name, file in tables.items():
        printed = run("iasl", "-d", file.name, cwd=tmp_path)
        assert not re.search(r"error|warning|invalid|unknown|checksum", printed, re.IGNORECASE), printed
        source = file.with_suffix(".dsl")
        assert "Unknown" not in source.read_text(), name
        printed = run("iasl", "-oa", "-p", f"again-{name}", source.name, cwd=tmp_path)
        assert "0 Errors, 0 Warnings, 0 Remarks" in printed, printed
        again = (tmp_path / f"again-{name}.aml").read_bytes()
        # iasl writes its own name into the header, and so another checksum; what follows is what it read.
        assert again[36:] == file.read_bytes()[36:], name


def evaluate(dsdt: Path, command: str) -> str:
    """What ACPICA's interpreter, which is Linux's as well, makes of a command with the DSDT loaded."""
    return run("acpiexec", "-da", "-b", command, dsdt.name, cwd=dsdt.parent)


def test_acpica_powers_off_by_what_s5_says(tables: dict[str, Path]) -> None:
    printed = evaluate(tables["DSDT"], "evaluate \\_S5")
    assert re.search(r"\[Package\].*Contains 4 Elements", printed), printed
    assert re.search(r"\[Integer\] = 0+5\b", printed), printed


@pytest.mark.parametrize("tables", [PLATFORMS["everything"]], indirect=True, ids=["everything"])
def test_acpica_negotiates_control_of_pci_express(tables: dict[str, Path]) -> None:
    """_OSC grants the capability structure, masks the rest, and says so (ACPI 6.5, 6.2.11)."""

    def osc(uuid: str, revision: int, wanted: int) -> tuple[int, int]:
        words = struct.pack("<3I", 0, 0, wanted).hex(" ").upper()
        printed = evaluate(tables["DSDT"], f"execute \\_SB.PCI0._OSC ({uuid}) {revision} 3 ({words})")
        result = re.search(r"\[Buffer\] Length 0C =\s*(?:0000: )?((?:[0-9A-F]{2} ){12})", printed)
        assert result, printed
        status, _, control = struct.unpack("<3I", bytes.fromhex(result[1]))
        return status, control

    pci = "5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66"
    assert osc(pci, 1, 0x10) == (0, 0x10)
    assert osc(pci, 1, 0x1F) == (0x10, 0x10)
    assert osc(pci, 2, 0x10) == (0x08, 0x10)
    assert osc("00 " + pci[3:], 1, 0x10) == (0x04, 0x10)


def test_debians_kernel_as_bzimage(debian_kernel: Path) -> None:
    image, memory = debian_kernel.read_bytes(), guest_memory(512 * MIB)
    state = load(memory, debian_kernel, command_line="console=ttyS0", platform=Platform(vcpus=4))
    start = (image[0x1F1] + 1) * 512
    address = int.from_bytes(image[0x258:0x260], "little")  # where the kernel prefers to be
    assert state.rip == address + 0x200
    assert memory.read(address, 1 * MIB) == image[start : start + 1 * MIB]
    assert memory.read(state.rsi + 0x1F1, 0x1F) == image[0x1F1:0x210]


@pytest.mark.parametrize("boot", ["linux", "pvh"])
def test_debians_kernel_as_elf(debian_kernel: Path, boot: str, tmp_path: Path) -> None:
    """The segments that readelf sees are in memory, and the entry is what it calls so."""
    from viaduct.vmm.boot.image import Image
    from viaduct.vmm.boot.payload import unpack

    with Image.open(debian_kernel, "--kernel") as image, unpack(image, 512 * MIB) as unpacked:
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(unpacked.read(0, unpacked.size, "all of it"))
    content = kernel.read_bytes()
    for path in (kernel, debian_kernel):
        memory = guest_memory(512 * MIB)
        state = load(memory, path, boot=boot)
        printed = run("readelf", "--wide", "--file-header", "--segments", "--notes", kernel)
        if boot == "linux":
            entry = re.search(r"Entry point address:\s+(0x[0-9a-f]+)", printed)
            assert entry, printed
            assert state.rip == int(entry[1], 16)
        else:
            note = re.search(r"Xen .*\(?0x00000012\)?\s+description data: ((?:[0-9a-f]{2} )+)", printed)
            assert note, printed
            assert state.rip == int.from_bytes(bytes.fromhex(note[1]), "little")
        segments = re.findall(r"^  LOAD +(0x\w+) 0x\w+ (0x\w+) (0x\w+) (0x\w+)", printed, re.MULTILINE)
        assert len(segments) >= 2
        for offset, address, file_size, memory_size in (map(lambda text: int(text, 16), row) for row in segments):
            assert memory.read(address, file_size) == content[offset : offset + file_size]
            assert memory.read(address + file_size, memory_size - file_size) == bytes(memory_size - file_size)
