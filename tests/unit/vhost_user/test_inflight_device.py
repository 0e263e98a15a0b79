"""Devices whose requests in flight survive the process that took them."""

from __future__ import annotations

import os

import pytest

from vhost_user.wire_client import memfd
from viaduct._core import inflight_bytes
from viaduct.vhost_user import Inflight, RequestError
from viaduct.vhost_user.handover import Fds
from viaduct.vhost_user.inflight import InflightDevice
from viaduct.virtio.features import DeviceFeature


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_new_buffer_has_a_region_for_each_queue(layout: str) -> None:
    device = InflightDevice()
    device.negotiated = int(DeviceFeature.RING_PACKED) if layout == "packed" else 0
    fd, size, offset = device.get_inflight(3, 256)
    bytes_each = inflight_bytes("packed" if layout == "packed" else "split", 256)
    assert (size, offset, os.fstat(fd).st_size) == (3 * bytes_each, 0, size)
    device.set_inflight(Inflight(fd, size, offset, 3, 256))
    os.close(fd)
    regions = [device.inflight_region(index) for index in range(3)]
    assert [region and region[1] for region in regions] == [0, bytes_each, 2 * bytes_each]
    device.forget_inflight()
    assert device.inflight_region(0) is None


@pytest.mark.parametrize(("index", "size"), [(2, 1 << 20), (1, 5000)], ids=["queues", "bytes"])
def test_a_buffer_that_is_too_small(index: int, size: int) -> None:
    device = InflightDevice()
    fd = memfd(1 << 20)
    device.set_inflight(Inflight(fd, size, 0, 2, 256))
    os.close(fd)
    with pytest.raises(RequestError, match=f"a buffer of {size} bytes for 2 queues of 256, for queue {index}; allowed"):
        device.inflight_region(index)
    device.forget_inflight()


def test_the_buffer_goes_with_the_connection() -> None:
    old, new = InflightDevice(), InflightDevice()
    fd = memfd(1 << 16)
    old.set_inflight(Inflight(fd, 1 << 15, 4096, 2, 64))
    os.close(fd)
    borrowed = Fds()
    saved = old.save(borrowed)
    received = Fds([os.dup(each) for each in borrowed.fds])
    new.restore(saved, received)
    received.close()
    for device in (old, new):
        region = device.inflight_region(1)
        assert region is not None
        assert (region[1], os.fstat(region[0]).st_size) == (4096 + inflight_bytes("split", 64), 1 << 16)
    old.forget_inflight()
    new.forget_inflight()
