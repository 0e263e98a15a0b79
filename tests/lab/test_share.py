"""A directory of the host in a guest of ours: Linux's virtiofs, virtiofsd behind it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lab.guest import viaduct_guest

pytestmark = pytest.mark.lab

MIB = 1 << 20


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_guest_reads_and_writes_a_directory(transport: str, tmp_path: Path) -> None:
    """What the host wrote before and while the guest runs, and what the guest writes, arrives byte for byte."""
    shared = tmp_path / "shared"
    shared.mkdir()
    before, meanwhile = os.urandom(3 * MIB), os.urandom(MIB + 1)
    (shared / "before").write_bytes(before)
    options = ("--transport", transport, "--share", f"{shared},tag=data")
    with viaduct_guest("sharing", tmp_path, *options) as guest:
        guest.run("mkdir -p /mnt && mount -t virtiofs data /mnt")
        assert checksum(guest.run("sha256sum </mnt/before")) == hashlib.sha256(before).hexdigest()
        (shared / "meanwhile").write_bytes(meanwhile)
        assert checksum(guest.run("sha256sum </mnt/meanwhile")) == hashlib.sha256(meanwhile).hexdigest()
        written = guest.run(
            "mkdir /mnt/below && dd if=/dev/urandom of=/tmp/data bs=64k count=33 2>/dev/null && "
            "cp /tmp/data /mnt/below/new && sync && mv /mnt/below/new /mnt/below/moved && rm /mnt/before && "
            "sha256sum </tmp/data"
        )
        there = (shared / "below" / "moved").read_bytes()
        assert len(there) == 33 << 16
        assert checksum(written) == hashlib.sha256(there).hexdigest()
        assert sorted(path.name for path in shared.iterdir()) == ["below", "meanwhile"]
        guest.run("umount /mnt")
        assert guest.power_off() == 0


def checksum(line: str) -> str:
    """The sum in what sha256sum prints."""
    return line.split()[0]
