"""A device that a user wrote, in a machine of ours, with Linux's own driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.guest import viaduct_guest

pytestmark = pytest.mark.lab

DEVICE = '''
from viaduct._core import Chain
from viaduct.vhost_user import QueueDevice
from viaduct.virtio import DeviceType


class Dice(QueueDevice):
    """A source of entropy without any: one can tell what comes from it."""

    device_id = DeviceType.ENTROPY

    def handle(self, queue: int, chain: Chain) -> None:
        chain.write(b"\\x04" * min(chain.writable_len, 4096))
'''
READ = """
for source in $(grep -o 'virtio_rng[^ ]*' /sys/class/misc/hw_random/rng_available); do
    echo $source >/sys/class/misc/hw_random/rng_current
    echo $source $(dd if=/dev/hwrng bs=512 count=4 iflag=fullblock 2>/dev/null | tail -c 512 | od -An -v -tu1)
done
"""
"""The end of what each source gives, because at first there may be left something of the one before."""


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_driver_reads_from_a_class_in_python(transport: str, tmp_path: Path) -> None:
    """Beside the machine's own source, which is one."""
    (tmp_path / "dice.py").write_text(DEVICE)
    options = ("--transport", transport, "--device", f"{tmp_path / 'dice.py'}:Dice")
    with viaduct_guest("user", tmp_path, *options) as guest:
        found = {}
        for line in guest.run(READ).splitlines():
            source, *values = line.split()
            found[source] = values
        assert len(found) == 2, found
        assert sorted(len(set(values)) > 1 for values in found.values()) == [False, True], found
        assert ["4"] * 512 in found.values()
        assert guest.power_off() == 0
