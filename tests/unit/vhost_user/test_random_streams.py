"""Whatever a front-end sends, the back-end answers or closes, loses nothing and serves the next one.

The messages are drawn from the protocol table: mostly well-formed requests with small mistakes in them, which get
further than noise does.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import HEADER, MEMORY_SIZE, USER_BASE, Guest, address, memfd, regions, single, state, u64
from viaduct.vhost_user import Backend, Vring
from viaduct.vhost_user.protocol import FRONT_END_REQUESTS, Request

RING_REQUESTS = [FRONT_END_REQUESTS[number] for number in (5, 8, 9, 10, 11, 12, 13, 14, 18, 34, 37, 38)]
RINGS = st.sampled_from([0, 0, 1, 5, 6, 0xFFFFFFFF])
REGIONS = st.sampled_from(
    [
        (0, MEMORY_SIZE, USER_BASE, 0),
        (MEMORY_SIZE, MEMORY_SIZE, USER_BASE + MEMORY_SIZE, 0),
        (0, 4096, USER_BASE, 0),
        (1 << 63, 1 << 63, 0, 0),
        (0, 0, 0, 0),
    ]
)
ADDRESSES = st.sampled_from([USER_BASE, USER_BASE + 0x2000, USER_BASE + 0x3000, USER_BASE + 1, 0, (1 << 64) - 1])
NUMBERS = st.sampled_from([0, 1, 2, 256, 0x8000, 0x80008000, 0xFFFFFFFF])
PAYLOADS: dict[str, st.SearchStrategy[bytes]] = {
    "u64": st.builds(u64, st.sampled_from([0, 1, 1 << 32, 1 << 30 | 1 << 32, 1 << 34, 0xFF, 1500, (1 << 64) - 1])),
    "u64: vring index and invalid FD flag": st.builds(u64, st.sampled_from([0, 1, 0x100, 0x106, 6, 1 << 40])),
    "vring state description": st.builds(state, RINGS, NUMBERS),
    "vring descriptor index or indices": st.builds(state, RINGS, NUMBERS),
    "vring address description": st.builds(address, RINGS, ADDRESSES, ADDRESSES, ADDRESSES),
    "multiple memory regions description": st.lists(REGIONS, max_size=3).map(lambda each: regions(*each)),
    "single memory region description": st.builds(single, REGIONS),
}


def payload_of(request: Request) -> st.SearchStrategy[bytes]:
    right = PAYLOADS.get(request.payload.title, st.just(request.payload.example))
    wrong = st.one_of(st.binary(max_size=64), right.map(lambda data: data[:-1]), right.map(lambda data: data + b"\0"))
    return st.one_of(right, right, right, right, wrong)


@st.composite
def message(draw: st.DrawFn) -> tuple[bytes, int, str]:
    """Bytes, number of descriptors, kind of descriptor."""
    request = draw(st.sampled_from([*FRONT_END_REQUESTS.values()] + 3 * RING_REQUESTS))
    payload = draw(payload_of(request))
    number = draw(st.sampled_from([request.number] * 19 + [0xFFFF]))
    flags = draw(st.sampled_from([1, 9, 9, 9, 9, 9, 9, 9, 9, 0, 5, 0xFFFFFFFD]))
    size = draw(st.sampled_from([len(payload)] * 29 + [0xFFFFFFFF]))
    usual = request.fds.maximum if request.fds.maximum <= 1 else payload[0] if payload else 0
    count = draw(st.sampled_from([min(usual, 8)] * 8 + [0, 1, 9]))
    kind = (
        draw(st.sampled_from(["memory"] * 5 + ["event"]))
        if request.fds.maximum > 1 or request.number == 37
        else "event"
    )
    return HEADER.pack(number, flags, size) + payload, count, kind


def ring_start(index: int) -> list[tuple[bytes, int, str]]:
    """What starts a ring, if features and memory are there and nothing forbids it."""
    start = USER_BASE + index * 0x10000
    requests = (
        (8, state(index, 256), 0),
        (9, address(index, start, start + 0x3000, start + 0x2000), 0),
        (18, state(index, 1), 0),
        (12, u64(index), 1),
    )
    return [(HEADER.pack(number, 9, len(payload)) + payload, count, "event") for number, payload, count in requests]


STREAMS = st.lists(st.one_of(message().map(lambda each: [each]), st.integers(0, 2).map(ring_start)), max_size=25).map(
    lambda groups: [each for group in groups for each in group]
)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def play(messages: list[tuple[bytes, int, str]], negotiate: bool) -> None:
    device = RecordingDevice()
    loop = asyncio.get_running_loop()
    broken: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: broken.append(context))
    before = open_descriptors()
    with tempfile.TemporaryDirectory(prefix="vu") as directory:
        async with Backend(device, str(Path(directory) / "s")) as backend:
            guest = Guest(backend.path)
            descriptors = {"memory": memfd(MEMORY_SIZE), "event": os.eventfd(0)}
            if negotiate:
                await guest.negotiate()
                await guest.share()
            for data, count, kind in messages:
                try:
                    guest.raw(data, [descriptors[kind]] * count)
                except (BrokenPipeError, ConnectionResetError):
                    break
                await asyncio.sleep(0)
            guest.close()
            for fd in descriptors.values():
                os.close(fd)
            after = Guest(backend.path)
            assert (await after.ask(1)).u64
            after.close()
    assert open_descriptors() == before
    assert broken == []
    check(device)


def check(device: RecordingDevice) -> None:
    """The order of calls that `Device` promises: started queues only, and only in memory that holds them."""
    running: dict[int, Vring] = {}
    memory: list[tuple[int, int, int, int]] = []
    for name, *arguments in device.calls:
        if name == "set_memory":
            (memory,) = arguments
        elif name == "start_queue":
            assert arguments[0].index not in running
            running[arguments[0].index] = arguments[0]
        elif name == "stop_queue":
            del running[arguments[0]]
        elif name in ("enable_queue", "set_call", "set_err"):
            assert arguments[0] in running
        for vring in running.values():
            assert any(user <= vring.descriptor_addr < user + size for _, size, user, _ in memory)
    assert not running


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=STREAMS, negotiate=st.booleans())
def test_random_messages(messages: list[tuple[bytes, int, str]], negotiate: bool) -> None:
    asyncio.run(play(messages, negotiate))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(min_size=1, max_size=200))
def test_noise(noise: bytes) -> None:
    asyncio.run(play([(noise, 1, "event")], negotiate=False))
