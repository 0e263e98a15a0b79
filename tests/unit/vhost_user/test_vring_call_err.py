"""SET_VRING_CALL and SET_VRING_ERR."""

import os

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NO_FD, Guest, state, u64
from viaduct.vhost_user import Backend


async def test_a_running_ring_gets_the_new_call(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(13, u64(0), [ready.event()]) == ACK
    assert await ready.ack(13, u64(0), [ready.event()]) == ACK
    assert await ready.ack(13, u64(NO_FD)) == ACK
    calls = device.named("set_call")
    assert [fd is None for _, _, fd in calls] == [False, False, True]


async def test_the_new_call_of_a_running_ring_is_signalled_once(ready: Guest) -> None:
    """QEMU starts a ring with a descriptor that it does not listen to, and gives the guest's afterwards: what the first
    one was told is lost."""
    first, second = ready.event(), ready.event()
    assert await ready.ack(13, u64(0), [first]) == ACK
    await ready.start()
    assert await ready.ack(13, u64(0), [second]) == ACK
    assert os.eventfd_read(second) == 1


async def test_call_outlives_a_stop(ready: Guest, device: RecordingDevice) -> None:
    """DPDK's virtio-user sends it once and starts and stops the ring many times."""
    assert await ready.ack(13, u64(0), [ready.event()]) == ACK
    await ready.start()
    await ready.ask(11, state(0, 0))
    await ready.start()
    assert device.named("start_queue")[-1][1].call_fd is not None


async def test_a_failed_queue_is_signalled(ready: Guest, device: RecordingDevice, backend: Backend) -> None:
    err = ready.event()
    assert await ready.ack(14, u64(0), [err]) == ACK
    await ready.start()
    backend.fail_queue(0, "descriptor 7 loops; allowed: chains without loops (virtio 1.2, 2.7.5.2)")
    assert os.eventfd_read(err) == 1


async def test_a_running_ring_gets_the_new_err(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(14, u64(0), [ready.event()]) == ACK
    assert len(device.named("set_err")) == 1
