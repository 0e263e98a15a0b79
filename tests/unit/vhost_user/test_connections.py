"""One front-end after the other, and nobody disturbed by another port's trouble."""

import asyncio
import logging
import os
from pathlib import Path

import pytest

from vhost_user.stand_ins import RecordingDevice, until
from vhost_user.wire_client import ACK, Guest, u64
from viaduct.vhost_user import Backend, VhostUserError


async def test_a_second_front_end_is_refused_at_once(
    wire: Guest, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    assert await wire.ack(3) == ACK
    second = Guest(backend.path)
    assert await second.closed()
    second.close()
    assert f"refused a second front-end, pid {os.getpid()}" in caplog.text
    assert (await wire.ask(1)).u64


async def test_the_next_front_end_is_served(backend: Backend, device: RecordingDevice) -> None:
    for _ in range(3):
        guest = Guest(backend.path)
        await guest.negotiate()
        await guest.share()
        await guest.start()
        guest.close()
    await asyncio.sleep(0)
    guest = Guest(backend.path)
    assert (await guest.ask(1)).u64
    guest.close()
    assert len(device.named("stop_queue")) == 3


async def test_one_that_comes_while_the_last_one_leaves_is_not_refused(backend: Backend) -> None:
    """Both events are in the sockets before the back-end sees either."""
    first = Guest(backend.path)
    assert (await first.ask(1)).u64
    first.send(3)
    first.close()
    second = Guest(backend.path)
    assert (await second.ask(1)).u64
    second.close()


async def test_a_new_session_starts_from_nothing(backend: Backend, device: RecordingDevice) -> None:
    first = Guest(backend.path)
    await first.negotiate()
    await first.share()
    first.close()
    second = Guest(backend.path)
    assert await second.ack(12, u64(0), [second.event()]) == ACK
    assert await second.ack(3) == ACK
    second.close()
    assert not device.named("start_queue")


async def test_rings_stop_when_the_front_end_goes(ready: Guest, device: RecordingDevice) -> None:
    await ready.start(0)
    await ready.start(5)
    ready.sock.shutdown(1)
    assert await ready.closed()
    assert [call[0] for call in device.calls[-3:]] == ["stop_queue", "stop_queue", "disconnected"]


async def test_a_device_that_fails_at_the_end_does_not_stop_the_next_session(
    backend: Backend, device: RecordingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    device.failing |= {"stop_queue", "disconnected"}
    guest = Guest(backend.path)
    await guest.negotiate()
    await guest.share()
    await guest.start()
    guest.close()
    second = Guest(backend.path)
    assert (await second.ask(1)).u64
    second.close()
    assert "the device failed to stop queue 0" in caplog.text


async def test_a_device_that_refuses_the_connection(backend: Backend, device: RecordingDevice) -> None:
    device.failing.add("connected")
    guest = Guest(backend.path)
    assert await guest.closed()
    guest.close()
    assert device.end == "RuntimeError: connected failed on purpose; connection closed"


async def test_cut_off(ready: Guest, backend: Backend, device: RecordingDevice) -> None:
    await ready.start()
    backend.disconnect("its memory faulted")
    await device.ended.wait()
    assert await ready.closed()
    assert device.end == "its memory faulted"


async def test_close_ends_the_session_and_removes_the_socket(
    ready: Guest, backend: Backend, device: RecordingDevice
) -> None:
    await ready.start()
    await backend.close()
    assert await ready.closed()
    assert device.end == "the port was closed"
    with pytest.raises(FileNotFoundError):
        Guest(backend.path)
    await backend.close()


async def test_another_port_does_not_notice(backend: Backend, ready: Guest, socket_dir: Path) -> None:
    async with Backend(RecordingDevice(), str(socket_dir / "other.sock")) as other:
        bad = Guest(other.path)
        bad.send(99)
        assert await bad.closed()
        bad.close()
        assert (await ready.ask(1)).u64


async def test_a_second_start(backend: Backend) -> None:
    with pytest.raises(VhostUserError, match="port vm1 is started already"):
        await backend.start()


async def test_whats_logged_of_a_life(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    guest = Guest(backend.path)
    assert (await guest.ask(1)).u64
    guest.sock.shutdown(1)
    assert await guest.closed()
    guest.close()
    await until(lambda: len(caplog.messages) == 2)
    who = f"port vm1 ({backend.path}, peer pid {os.getpid()})"
    assert caplog.messages == [f"{who}: connected", f"{who}: disconnected: the front-end closed the connection"]


async def test_a_close_before_the_session_begins(backend: Backend, device: RecordingDevice) -> None:
    guest = Guest(backend.path)
    await until(lambda: backend.peer)
    await backend.close()
    assert await guest.closed()
    guest.close()


@pytest.mark.parametrize("turns", range(6))
async def test_a_close_at_any_moment(backend: Backend, device: RecordingDevice, turns: int) -> None:
    guests = [Guest(backend.path) for _ in range(3)]
    for _ in range(turns):
        await asyncio.sleep(0)
    await backend.close()
    for guest in guests:
        assert await guest.closed()
        guest.close()
