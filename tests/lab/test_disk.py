"""Disks: fio's own checksums, read-only disks, and power that fails while the guest writes."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from lab.guest import Guest, viaduct_guest

pytestmark = pytest.mark.lab

MIB = 1 << 20
ROOT = "/dev/vda"
"""The lab's own root image, which guests borrow for the programs on it."""
RECORD = 4096
WRITER = f"""
for number in $(seq %d 100000); do
    printf '%%0{RECORD}d' $number | dd of=/dev/vda bs={RECORD} seek=$number conv=fsync,notrunc 2>/dev/null || break
    echo written $number >/dev/console
done
"""
"""Each record says its own number, and is announced when it is safe."""
CUTS = 3
LEAKED = 3
"""The status of `qemu-img check` when the cut has left clusters without a use, and nothing else is wrong."""


def image(directory: Path, kind: str, size: int) -> str:
    """An empty disk, as `--disk` takes it."""
    path = directory / f"disk.{kind}"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, str(size)], check=True)
    return f"{path},format={kind}"


def run_from_root(guest: Guest, command: str) -> str:
    """Run a program of the lab's root image, which is the guest's second disk, in the guest."""
    guest.run(
        "mkdir -p /tmp/root; mount -t erofs -o ro /dev/vdb /tmp/root && mount --bind /dev /tmp/root/dev && "
        "mount -t proc proc /tmp/root/proc && mount -t tmpfs tmp /tmp/root/tmp"
    )
    return guest.run(f"cd /tmp/root/tmp && chroot /tmp/root {command}")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_fio_reads_what_it_wrote(kind: str, tmp_path: Path) -> None:
    """Blocks in random order, eight at once, each with a checksum and its place in it."""
    with viaduct_guest("fio", tmp_path, "--disk", image(tmp_path, kind, 64 * MIB), "--disk", f"{ROOT},ro") as guest:
        output = run_from_root(
            guest,
            "fio --name=check --filename=/dev/vda --size=2M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio "
            "--iodepth=8 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --fsync=64",
        )
        assert "err= 0" in output, output


def test_read_only_disk_is_not_written(tmp_path: Path) -> None:
    """The driver knows that it may not, so nobody even tries."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"as it was" + bytes(MIB - 9))
    with viaduct_guest("reader", tmp_path, "--disk", f"{disk},ro") as guest:
        assert guest.run("cat /sys/block/vda/ro").strip() == "1"
        assert guest.ask("echo changed >/dev/vda")[0] != 0
        assert guest.run("head -c 9 /dev/vda") == "as it was"
    assert disk.read_bytes()[:9] == b"as it was"


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_was_synchronised_survives_a_power_cut(kind: str, tmp_path: Path) -> None:
    """The machine is killed while its guest writes, and goes on after the last safe record; all of these are there."""
    disk = image(tmp_path, kind, 512 * MIB)
    last = 0
    for cut in range(CUTS):
        with viaduct_guest(f"writer{cut}", tmp_path, "--disk", disk) as guest:
            guest.send(WRITER % (last + 1))
            for _ in range(5 + 10 * cut):
                last = int(guest.expect(r"written (\d+)")[1])
            time.sleep(0.1 * cut)
            guest.kill()
        check(tmp_path / f"disk.{kind}", kind, last)


def check(disk: Path, kind: str, last: int) -> None:
    """The disk holds each record up to the last one that is known to be safe, and an undamaged format around them."""
    if kind != "raw":
        assert subprocess.run(["qemu-img", "check", "-q", disk]).returncode in (0, LEAKED), "qemu-img finds it damaged"
    content = disk.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-O", "raw", "-f", kind, disk, content], check=True)
    with content.open("rb") as file:
        for number in range(1, last + 1):
            file.seek(number * RECORD)
            assert re.fullmatch(rb"0*(\d+)", file.read(RECORD)).group(1) == b"%d" % number  # type: ignore[union-attr]
    content.unlink()
