"""Disk images that QEMU made and checks: qcow2 in its varieties, formats that are not guessed, locks, full disks."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from devices.disk_driver import DISCARD, FLUSH, IOERR, OK, OUT, SECTOR, UNMAP, WRITE_ZEROES, Disk, segment
from devices.slot import Slot, until

from interop.peer_process import require, wait_until
from viaduct.devices.block import BlockDevice, ImageError

SIZE = 8 << 20
LAST = SIZE // SECTOR


def qcow2(path: Path, *options: str, size: int = SIZE) -> Path:
    """A qcow2 image made by QEMU."""
    subprocess.run(
        [require("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", *options, path, str(size)], check=True
    )
    return path


@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
async def test_a_disk_in_use_is_refused(tmp_path: Path, name: str) -> None:
    path = qcow2(tmp_path / name)
    kind: Literal["raw", "qcow2"] = "qcow2" if name.endswith("qcow2") else "raw"
    first = BlockDevice(path, format=kind)
    with pytest.raises(
        ImageError, match="is in use: another process has it open and allows no writers; end the machine"
    ):
        BlockDevice(path, format=kind)
    with pytest.raises(ImageError, match=f"{name} is in use: another process writes to it"):
        BlockDevice(path, format=kind, read_only=True)
    first.close()
    readers = [BlockDevice(path, format=kind, read_only=True) for _ in range(2)]
    with pytest.raises(ImageError, match="allows no writers"):
        BlockDevice(path, format=kind)
    for reader in readers:
        reader.close()
    BlockDevice(path, format=kind).close()


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_locks_are_those_of_qemu(tmp_path: Path, kind: Literal["raw", "qcow2"]) -> None:
    path = tmp_path / "disk"
    if kind == "qcow2":
        qcow2(path)
    else:
        fill(path, bytes(SIZE))
    write: list[str | Path] = [require("qemu-io", "qemu-utils"), "-f", kind, "-c", "write 0 512", path]
    device = BlockDevice(path, format=kind)
    refused = subprocess.run(write, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    device.close()
    # QEMU has it open until its input ends.
    command = [str(word) for word in write[:3]] + [str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write("write 0 512\n")
        qemu.stdin.flush()
        while "wrote 512/512" not in qemu.stdout.readline():
            assert qemu.poll() is None, "qemu-io ended"
        with pytest.raises(ImageError, match="disk is in use: another process"):
            BlockDevice(path, format=kind)
        with pytest.raises(ImageError, match="disk is in use: another process writes to it"):
            BlockDevice(path, format=kind, read_only=True)
        qemu.stdin.close()
    BlockDevice(path, format=kind).close()


def test_a_raw_disk_is_not_taken_for_a_qcow2_image(tmp_path: Path) -> None:
    raw = tmp_path / "disk.img"
    qcow2(raw)
    with pytest.raises(ImageError, match="begins like a qcow2 image, which a guest can write into a raw disk as well"):
        BlockDevice(raw)
    for kind in ("raw", "qcow2"):
        device = BlockDevice(raw, format=kind)
        assert (device.format, device.size == SIZE) == (kind, kind == "qcow2")
        device.close()
    named = tmp_path / "disk.qcow2"
    named.write_bytes(bytes(SECTOR))
    with pytest.raises(ImageError, match=r"begins with .*; is it a raw disk"):
        BlockDevice(named)


def content_of(path: Path) -> bytes:
    """All bytes of a file."""
    return path.read_bytes()


def run(*words: str | Path) -> int:
    """Runs a command and returns its status."""
    return subprocess.run(words).returncode


def fill(path: Path, content: bytes) -> None:
    """Makes a file with this content."""
    path.write_bytes(content)


@pytest.fixture
def small_file_system(directory: Path) -> Iterator[Path]:
    """A file system with room for 64 KiB; only root can make one."""
    assert run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory) == 0
    yield directory
    # A file of an io_uring that has ended is let go a moment later.
    wait_until(lambda: run("umount", directory) == 0, "the file system is let go")


async def test_a_full_file_system(small_file_system: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = small_file_system / "disk.img"
    fill(image, b"")
    os.truncate(image, SIZE)
    device = BlockDevice(image)
    async with Slot(device) as slot:
        disk = Disk(slot.rings[0])
        statuses = [(await disk.ask(OUT, 8 * n, b"z" * 4096))[0] for n in range(100)]
        assert OK in statuses
        assert IOERR in statuses
        await until(lambda: "make room on the host's file system" in caplog.text)
        assert await disk.read(0) == b"z" * SECTOR
    device.close()


def check(path: Path) -> None:
    """Raises if QEMU finds anything wrong with an image."""
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=4k"), ("-o", "compat=0.10"), ("-o", "refcount_bits=1")])
async def test_a_qcow2_image(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = qcow2(tmp_path / "disk.qcow2", *options)
    content = bytearray(SIZE)
    chosen = random.Random(5)
    device = BlockDevice(path)
    assert (device.format, device.size) == ("qcow2", SIZE)
    async with Slot(device) as slot:
        disk = Disk(slot.rings[0])
        for number in range(300):
            sector, count = chosen.randrange(LAST - 8), chosen.randint(1, 8)
            match chosen.randrange(6):
                case 0:
                    assert (await disk.ask(WRITE_ZEROES, out=segment(sector, count, number & 1)))[0] == OK
                    content[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
                case 1:
                    start = sector - sector % 256
                    assert (await disk.ask(WRITE_ZEROES, out=segment(start, 256, UNMAP)))[0] == OK
                    content[start * SECTOR : (start + 256) * SECTOR] = bytes(256 * SECTOR)
                case _:
                    data = chosen.randbytes(count * SECTOR)
                    await disk.write(sector, data)
                    content[sector * SECTOR : (sector + count) * SECTOR] = data
        for sector in range(0, LAST, 8):
            assert await disk.read(sector, 8) == content[sector * SECTOR : (sector + 8) * SECTOR]
        assert (await disk.ask(DISCARD, out=segment(0, 2048)))[0] == OK
        await disk.write(0, bytes(content[:SECTOR]))
        assert (await disk.ask(FLUSH))[0] == OK
    device.close()
    check(path)
    assert run("qemu-img", "convert", "-O", "raw", path, tmp_path / "back") == 0
    assert content_of(tmp_path / "back")[1 << 20 :] == content[1 << 20 :]


def test_qcow2_images_that_are_refused(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "base.qcow2")
    qcow2(tmp_path / "top.qcow2", "-b", str(base), "-F", "qcow2")
    qcow2(tmp_path / "apart.qcow2", "-o", f"data_file={tmp_path / 'data'}")
    for name, complaint in (("top", "it has a backing file; only images"), ("apart", "its data are in another file")):
        with pytest.raises(ImageError, match=complaint):
            BlockDevice(tmp_path / f"{name}.qcow2")
    fields = {
        "version": (4, 4, 9, "qcow2 version 9"),
        "cluster": (20, 4, 40, "cluster size"),
        "encrypted": (32, 4, 1, "it is encrypted"),
        "tables": (36, 4, 0xFFFFFFFF, "L1 table"),
        "dirty": (72, 8, 1, "was not closed properly.*qemu-img check -r all"),
        "corrupt": (72, 8, 2, "marked as corrupt"),
        "unknown": (72, 8, 1 << 40, "feature"),
        "size": (24, 8, 1000, "a disk of 1000 bytes, which is no multiple of 512"),
    }
    for name, (offset, length, value, complaint) in fields.items():
        path = tmp_path / f"{name}.qcow2"
        header = bytearray(base.read_bytes())
        header[offset : offset + length] = value.to_bytes(length, "big")
        path.write_bytes(header)
        with pytest.raises(ImageError, match=complaint):
            BlockDevice(path)
