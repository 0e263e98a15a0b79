"""The stock drivers of a stock kernel bind to every device of a machine of ours, and the devices answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.guest import Guest, viaduct_guest
from lab.network import Network

pytestmark = pytest.mark.lab

DRIVERS = {1: "virtio_net", 2: "virtio_blk", 4: "virtio_rng", 5: "virtio_balloon", 19: "vmw_vsock_virtio_transport"}
"""By device type (virtio 1.3, 5)."""
DISK = 8 << 20


@pytest.fixture(scope="module", params=["pci"])
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A machine with one of everything."""
    directory = tmp_path_factory.mktemp("devices")
    (directory / "disk").write_bytes(bytes(DISK))
    options = ["--disk", str(directory / "disk"), "--balloon", "--vsock", str(directory / "vsock")]
    with Network(directory, ports=["card"]) as network:
        nic = ["--nic", f"vhost-user:{network.socket('card')}"]
        with viaduct_guest("all", directory, "--transport", request.param, *options, *nic) as guest:
            yield guest


@pytest.mark.parametrize("kind", DRIVERS)
def test_driver_binds(guest: Guest, kind: int) -> None:
    """There is one device of the type, and its driver has accepted it: status 15 is DRIVER_OK and all before it."""
    found = guest.run(
        "cd /sys/bus/virtio/devices; for device in *; do "
        "echo $(($(cat $device/device))) $(basename $(readlink $device/driver)) $(($(cat $device/status))); done"
    )
    devices = [line.split() for line in found.splitlines()]
    assert [words[1:] for words in devices if words[0] == str(kind)] == [[DRIVERS[kind], "15"]], found


def test_serial_port_is_a_16550(guest: Guest) -> None:
    """With its queue and its interrupt: the driver tells the kinds apart by trying."""
    assert "uart:16550A" in guest.run("grep ^0: /proc/tty/driver/serial")
    assert int(guest.run("grep ttyS0 /proc/interrupts").split()[1]) > 0


def test_clock_tells_the_hosts_time(guest: Guest) -> None:
    """Within the minutes that two readings may be apart on a machine that does other things as well."""
    import time

    there = int(guest.run("cat /sys/class/rtc/rtc0/since_epoch"))
    assert abs(there - time.time()) < 600


def test_entropy_comes(guest: Guest) -> None:
    """From the device, not from the kernel's own pool."""
    assert guest.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    assert len(set(guest.run("head -c 64 /dev/hwrng | hexdump -v -e '1/1 \"%02x \"'").split())) > 30


def test_disk_has_its_size(guest: Guest) -> None:
    """And its last sector can be written and read."""
    assert int(guest.run("cat /sys/block/vda/size")) * 512 == DISK
    last = DISK // 512 - 1
    guest.run(f"echo the last sector | dd of=/dev/vda bs=512 seek={last} conv=sync,fsync 2>/dev/null")
    assert guest.run(f"dd if=/dev/vda bs=512 skip={last} iflag=direct 2>/dev/null").startswith("the last sector")
