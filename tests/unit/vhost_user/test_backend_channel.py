"""SET_BACKEND_REQ_FD, and the requests that go over that channel."""

import asyncio
import socket

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, HEADER, NACK, Guest, u64
from viaduct.vhost_user import Backend


async def test_config_change(negotiated: Guest, backend: Backend) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not backend.config_changed()
        assert await negotiated.ack(21, b"", [theirs.fileno()]) == ACK
        assert backend.config_changed()
        assert ours.recv(100) == HEADER.pack(2, 1, 0)


async def test_a_front_end_that_does_not_listen_stops_nobody(negotiated: Guest, backend: Backend) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert await negotiated.ack(21, b"", [theirs.fileno()]) == ACK
        while backend.config_changed():
            pass
        assert (await negotiated.ask(1)).u64


async def test_what_waited_for_a_slow_front_end_comes_whole(negotiated: Guest, backend: Backend) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert await negotiated.ack(21, b"", [theirs.fileno()]) == ACK
        sent = 0
        while backend.config_changed():
            sent += 1
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        data = b""
        while len(data) < sent * HEADER.size:
            data += await loop.sock_recv(ours, 1 << 16)
        assert data == HEADER.pack(2, 1, 0) * sent
        assert backend.config_changed()


async def test_an_answer_that_nobody_asked_for_ends_the_channel_and_nothing_else(
    negotiated: Guest, backend: Backend
) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            assert await negotiated.ack(21, b"", [theirs.fileno()]) == ACK
        ours.send(HEADER.pack(2, 1 | 4, 8) + u64(0))
        ours.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(ours, 100) == b""
        assert not backend.config_changed()
        assert (await negotiated.ask(1)).u64


async def test_a_new_channel_replaces_the_old_one(negotiated: Guest, backend: Backend) -> None:
    first, first_theirs = socket.socketpair()
    second, second_theirs = socket.socketpair()
    with first, second, second_theirs:
        assert await negotiated.ack(21, b"", [first_theirs.fileno()]) == ACK
        first_theirs.close()
        assert await negotiated.ack(21, b"", [second_theirs.fileno()]) == ACK
        assert first.recv(1) == b""


async def test_config_change_needs_config(wire: Guest, backend: Backend) -> None:
    wire.send(16, u64(1 << 5 | 1 << 3))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert await wire.ack(21, b"", [theirs.fileno()]) == ACK
        assert not backend.config_changed()


async def test_no_socket(negotiated: Guest, device: RecordingDevice) -> None:
    assert await negotiated.ack(21, b"", [negotiated.memory()]) == NACK
    assert "a descriptor that is no socket" in device.failures[0]


async def test_the_wrong_kind_of_socket(negotiated: Guest, device: RecordingDevice) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inet:
        assert await negotiated.ack(21, b"", [inet.fileno()]) == NACK
    assert "allowed: a connected AF_UNIX stream socket" in device.failures[0]


@pytest.mark.parametrize("count", [0, 2])
async def test_takes_one_descriptor(negotiated: Guest, count: int) -> None:
    assert await negotiated.ack(21, b"", [negotiated.event() for _ in range(count)]) == NACK
