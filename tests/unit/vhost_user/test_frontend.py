"""Our front-end against our back-end, and against back-ends that misbehave."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vhost_user.stand_ins import RecordingDevice, until
from vhost_user.wire_client import HEADER
from viaduct.vhost_user import (
    Backend,
    FrontEnd,
    FrontEndError,
    ProtocolFeature,
    RequestError,
    VhostUserError,
    connection,
)
from viaduct.virtio import DeviceFeature, NetFeature

VERSION_1 = DeviceFeature.VERSION_1
PACKED = VERSION_1 | DeviceFeature.RING_PACKED
SMALL = 1 << 20


def make(path: str, features: int = VERSION_1, **options: object) -> FrontEnd:
    return FrontEnd(path, features=features, memory_size=SMALL, **options)  # type: ignore[arg-type]


async def test_what_the_device_is_told(backend: Backend, device: RecordingDevice) -> None:
    async with make(backend.path, queue_count=4, queue_size=(128, 256, 64, 32), user_base=0x1000_0000) as fe:
        assert [queue.size for queue in fe.queues] == [128, 256, 64, 32]
        vrings = [call[1] for call in device.named("start_queue")]
        for queue, vring in zip(fe.queues, vrings, strict=True):
            assert vring.descriptor_addr == queue.descriptor_addr + 0x1000_0000
            assert vring.driver_addr == queue.driver_addr + 0x1000_0000
            assert vring.device_addr == queue.device_addr + 0x1000_0000
            assert (vring.size, vring.base) == (queue.size, 0)
        assert len(device.named("enable_queue")) == 4
        assert device.get_status() == 0xF
        assert device.memory.regions == [(0, SMALL, 0x1000_0000, 0)]
    assert device.get_status() == 0
    assert len(device.named("stop_queue")) == 4


async def test_parts_of_rings_share_no_cache_line(backend: Backend) -> None:
    async with make(backend.path, features=PACKED, queue_count=6, queue_size=100) as fe:
        assert fe.layout == "packed"
        starts = [a for queue in fe.queues for a in (queue.descriptor_addr, queue.driver_addr, queue.device_addr)]
        assert starts == sorted(set(starts))
        assert all(start % 64 == 0 for start in starts)
        assert fe.data_addr % 4096 == 0
        assert fe.data_addr > starts[-1]


async def test_kicks_and_calls_are_connected(backend: Backend, device: RecordingDevice) -> None:
    async with make(backend.path) as fe:
        vring = device.named("start_queue")[1][1]
        os.eventfd_write(fe.queues[1].kick_fd, 3)
        assert os.eventfd_read(vring.kick_fd) == 3
        os.eventfd_write(vring.call_fd, 5)
        assert os.eventfd_read(fe.queues[1].call_fd) == 5


async def test_the_memory_cannot_change_its_size(backend: Backend) -> None:
    async with make(backend.path) as fe:
        with pytest.raises(PermissionError):
            os.ftruncate(fe.memory_fd, 4096)
        assert fcntl.fcntl(fe.memory_fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK


async def test_features_are_the_common_ones(backend: Backend, device: RecordingDevice) -> None:
    async with make(backend.path, features=VERSION_1 | NetFeature.MAC | NetFeature.GUEST_UFO) as fe:
        assert fe.features == VERSION_1 | NetFeature.MAC
        assert device.named("set_features") == [("set_features", fe.features)]


async def test_a_required_feature_is_missing(backend: Backend) -> None:
    fe = make(backend.path, required=NetFeature.GUEST_UFO)
    with pytest.raises(FrontEndError, match="does not offer GUEST_UFO; it offers MTU, MAC"):
        await fe.start()
    await fe.close()


async def test_too_many_queues(backend: Backend) -> None:
    fe = make(backend.path, queue_count=8)
    with pytest.raises(FrontEndError, match="it has 3 queue pairs, 4 were asked for"):
        await fe.start()
    await fe.close()


async def test_mtu_and_configuration(backend: Backend, device: RecordingDevice) -> None:
    async with make(backend.path, mtu=9000) as fe:
        assert device.named("set_mtu") == [("set_mtu", 9000)]
        assert fe.config is not None
        assert fe.config.mac == bytes(range(6))
        assert await fe.read_config(4, 8) == bytes(range(4, 12))


async def test_configuration_changes_are_told(backend: Backend) -> None:
    async with make(backend.path) as fe:
        changed = asyncio.Event()
        fe.on_config_change = changed.set
        assert backend.config_changed()
        await changed.wait()


async def test_memory_as_a_table(backend: Backend, device: RecordingDevice) -> None:
    async with make(backend.path, protocol_features=ProtocolFeature.REPLY_ACK) as fe:
        assert fe.protocol_features == ProtocolFeature.REPLY_ACK
        assert len(device.named("start_queue")) == 2


async def test_without_any_protocol_feature(backend: Backend, device: RecordingDevice) -> None:
    async with make(backend.path, protocol_features=ProtocolFeature(0)) as fe:
        assert len(fe.queues) == 2
        assert len(device.named("enable_queue")) == 2


@pytest.mark.parametrize(("features", "base"), [(VERSION_1, 7), (PACKED, 0x8007_8007)])
async def test_queues_go_on_where_they_stood(
    backend: Backend, device: RecordingDevice, features: int, base: int
) -> None:
    async with make(backend.path, features=features) as fe:
        device.base = base
        marker = fe.queues[0].device_addr
        os.pwrite(fe.memory_fd, b"still there", marker)
        bases = await fe.stop()
        assert bases == [base, base]
        await fe.start(bases)
        assert os.pread(fe.memory_fd, 11, marker) == b"still there"
        assert device.named("start_queue")[-1][1].base == base
        await fe.stop()
        await fe.start()
        assert os.pread(fe.memory_fd, 11, marker) == bytes(11)


async def test_the_back_end_goes_and_comes_back(socket_dir: Path) -> None:
    path = str(socket_dir / "s")
    async with Backend(RecordingDevice(), path):
        fe = make(path)
        await fe.start()
    await fe.lost.wait()
    assert fe.lost_reason == "the back-end closed the connection"
    assert fe.queues == ()
    with pytest.raises(FrontEndError, match="GET_STATUS: not connected: the back-end closed the connection"):
        await fe.request("GET_STATUS")
    starting = asyncio.create_task(fe.start())
    await asyncio.sleep(0.01)
    async with Backend(RecordingDevice(), path):
        await starting
        assert len(fe.queues) == 2
        await fe.close()
    await fe.close()


async def test_the_front_end_listens(socket_dir: Path, device: RecordingDevice) -> None:
    path = str(socket_dir / "s")
    fe = make(path, server=True)
    starting = asyncio.create_task(fe.start())
    await asyncio.sleep(0)
    async with Backend(device, path, client=True):
        await starting
        await fe.close()
    assert not os.listdir(socket_dir)


async def test_a_refusal_is_an_error_at_the_request(backend: Backend, device: RecordingDevice) -> None:
    device.failing.add("set_mtu")
    fe = make(backend.path, mtu=1500)
    with pytest.raises(FrontEndError, match=r"NET_SET_MTU\(1500,\): refused with 0x1 \(vhost-user"):
        await fe.start()
    await until(lambda: device.end)
    device.failing.clear()
    await fe.start()
    await fe.close()


async def test_a_refusal_by_an_answer(backend: Backend, device: RecordingDevice) -> None:
    async with make(backend.path) as fe:
        with pytest.raises(FrontEndError, match=r"GET_CONFIG.*: refused"):
            await fe.read_config(30, 8)


def test_bad_options() -> None:
    with pytest.raises(VhostUserError, match="3 queue sizes for 2 queues"):
        make("/tmp/x", queue_size=(1, 2, 3))


async def test_rings_that_do_not_fit(backend: Backend) -> None:
    fe = FrontEnd(backend.path, queue_size=32768, memory_size=SMALL, features=VERSION_1)
    with pytest.raises(VhostUserError, match="give more memory or choose smaller queues"):
        await fe.start()
    await fe.close()


async def test_a_size_that_the_layout_does_not_take(backend: Backend) -> None:
    fe = make(backend.path, queue_size=100)
    with pytest.raises(RequestError, match="queue size 100; allowed: a power of two"):
        await fe.start()
    await fe.close()


class BadBackEnd:
    """Accepts one connection and answers each message with what the test says."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.listener.setblocking(False)
        self.connection: socket.socket | None = None

    async def answer(self, data: bytes, fds: list[int] | None = None) -> None:
        """Waits for the first message and sends `data`."""
        loop = asyncio.get_running_loop()
        self.connection, _ = await loop.sock_accept(self.listener)
        await loop.sock_recv(self.connection, 12)
        if data:
            socket.send_fds(self.connection, [data], fds or [])
        else:
            self.connection.close()

    def close(self) -> None:
        self.listener.close()
        if self.connection is not None:
            self.connection.close()


@pytest.fixture
async def bad(socket_dir: Path) -> AsyncIterator[BadBackEnd]:
    back_end = BadBackEnd(str(socket_dir / "s"))
    yield back_end
    back_end.close()


FEATURES_REPLY = HEADER.pack(1, 5, 8) + struct.pack("=Q", 1 << 32)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(b"", "GET_FEATURES: connection lost: the back-end closed the connection", id="closes"),
        pytest.param(HEADER.pack(2, 5, 8) + bytes(8), "GET_FEATURES: the answer is to request 2", id="other request"),
        pytest.param(HEADER.pack(1, 1, 8) + bytes(8), "GET_FEATURES: the answer is to request 1", id="no reply flag"),
        pytest.param(HEADER.pack(1, 5, 4) + bytes(4), "GET_FEATURES: wrong answer: payload of 4 bytes", id="size"),
        pytest.param(HEADER.pack(1, 6, 8) + bytes(8), "protocol version 2", id="version"),
        pytest.param(FEATURES_REPLY * 2, "an answer to request 1 that nobody asked for", id="one too many"),
    ],
)
async def test_wrong_answers(bad: BadBackEnd, socket_dir: Path, data: bytes, said: str) -> None:
    fe = make(str(socket_dir / "s"))
    answering = asyncio.create_task(bad.answer(data, [0]))
    with pytest.raises(FrontEndError) as caught:
        await fe.start()
    assert said in str(caught.value)
    assert f"({socket_dir}/s, peer pid {os.getpid()})" in str(caught.value)
    await answering
    await fe.close()


async def test_no_answer(bad: BadBackEnd, socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REPLY_TIMEOUT", 0.01)
    fe = make(str(socket_dir / "s"))
    with pytest.raises(FrontEndError, match="GET_FEATURES: no answer in 0 s"):
        await fe.start()
    await fe.close()


async def test_a_driver_may_prepare_the_rings_before_the_back_end_hears_of_them(
    backend: Backend, device: RecordingDevice
) -> None:
    told: list[tuple[int, int]] = []
    fe = make(backend.path)
    fe.on_layout = lambda queues: told.append((len(queues), len(device.named("start_queue"))))
    await fe.start()
    await fe.close()
    assert told == [(2, 0)]
