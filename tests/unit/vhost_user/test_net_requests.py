"""SEND_RARP and NET_SET_MTU."""

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, Guest, u64


async def test_mtu(negotiated: Guest, device: RecordingDevice) -> None:
    assert await negotiated.ack(20, u64(9000)) == ACK
    assert device.named("set_mtu") == [("set_mtu", 9000)]


@pytest.mark.parametrize("mtu", [0, 67, 65536, 1 << 63])
async def test_mtu_out_of_range(negotiated: Guest, device: RecordingDevice, mtu: int) -> None:
    assert await negotiated.ack(20, u64(mtu)) == NACK
    assert f"MTU {mtu}; allowed: 68 to 65535 (virtio 1.2, 5.1.4.1)" in device.failures[0]


async def test_mtu_that_the_device_does_not_have(negotiated: Guest, device: RecordingDevice) -> None:
    device.failing.add("set_mtu")
    assert await negotiated.ack(20, u64(1500)) == NACK


async def test_rarp(negotiated: Guest, device: RecordingDevice) -> None:
    mac = bytes.fromhex("525400123456")
    assert await negotiated.ack(19, mac + b"\0\0") == ACK
    assert device.named("send_rarp") == [("send_rarp", mac)]


async def test_rarp_with_six_bytes_only(negotiated: Guest) -> None:
    assert await negotiated.ack(19, bytes(6)) == NACK
