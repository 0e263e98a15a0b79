"""Every device written in Python, against drivers that put anything into any queue.

A guest may do itself any harm; but the device raises nothing that stops a queue whose driver keeps to the rules of
virtqueues, keeps no more than it promises, and goes on to serve. Chains here are well-formed; what is in them is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.slot import RING, Slot
from viaduct.devices.balloon import Balloon
from viaduct.devices.console import Console, ConsolePort
from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.devices.entropy import Entropy
from viaduct.devices.vsock import Vsock
from viaduct.vhost_user import Device
from viaduct.virtio import DeviceFeature

SPARE = 16 * 4096
CID = 7


def console() -> Console:
    return Console(
        ConsoleTerminal(scroll_back=1000), ConsolePort(ConsoleTerminal(scroll_back=1000), "agent", console=False)
    )


def vsock() -> Vsock:
    return Vsock(str(Path(tempfile.mkdtemp(prefix="hv")) / "v"), guest_cid=CID, connections_max=8)


DEVICES: dict[str, Callable[[], Device]] = {
    "entropy": Entropy,
    "console": console,
    "balloon": lambda: Balloon(hinting=True),
    "vsock": vsock,
}

small = st.sampled_from([0, 1, 2, 3, 7, 53, CID, 0xFFFF, 0xFFFFFFFF])
headers = st.builds(
    lambda fields, rest: struct.pack("<QQIIIHHIII", *fields) + rest,
    st.tuples(
        st.sampled_from([CID, CID, CID, 2, 0]),
        st.sampled_from([2, 2, 2, CID, 99]),
        small,
        small,
        st.sampled_from([0, 1, 5, 64, 0xFFFFFFFF]),
        st.sampled_from([1, 1, 1, 2, 0xFFFF]),
        st.integers(0, 9),
        st.integers(0, 4),
        small,
        small,
    ),
    st.binary(max_size=64),
)
messages = st.builds(
    struct.pack,
    st.just("<IHH"),
    st.sampled_from([0, 1, 2, 0xFFFFFFFF]),
    st.integers(0, 9),
    st.sampled_from([0, 1, 0xFFFF]),
)
numbers = st.lists(st.integers(0, 40) | st.integers(0xFFFFFFF0, 0xFFFFFFFF), max_size=20).map(
    lambda pages: struct.pack(f"<{len(pages)}I", *pages)
)
contents = st.binary(max_size=200) | headers | messages | numbers
rooms = st.lists(st.sampled_from([1, 4, 43, 44, 45, 100, 1000]), max_size=3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("chain"), st.integers(0, 7), contents, rooms),
        st.tuples(st.just("anywhere"), st.integers(0, 7), st.integers(0, SPARE - 1), st.integers(1, SPARE)),
        st.tuples(st.just("config"), st.integers(0, 20), st.binary(min_size=1, max_size=16), st.just(0)),
        st.tuples(st.just("turn"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("pause"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=40,
)


def gives_away_rings(slot: Slot, data: bytes) -> bool:
    """Whether page numbers are among those of the pages in which the rings lie."""
    pages = {number for (number,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4])}
    return any(ring.start <= page * 4096 < ring.start + RING for ring in slot.rings for page in pages)


async def run(device: Device, features: int, script: list[tuple[str, int, object, object]]) -> None:
    async with Slot(device, features, queue_size=16, spare=SPARE) as slot:
        for what, number, first, second in script:
            ring = slot.rings[number % len(slot.rings)]
            match what:
                case "chain":
                    assert isinstance(first, bytes)
                    assert isinstance(second, list)
                    if isinstance(device, Balloon) and gives_away_rings(slot, first):
                        continue  # Its rings would be zeroes: the driver's own doing, and no matter of the device.
                    if (first or second) and ring.core.free >= 1 + len(second):
                        ring.add(out=first, room=second)
                case "anywhere":
                    assert isinstance(first, int)
                    assert isinstance(second, int)
                    if ring.core.free >= 2 and ring.free:
                        size = min(second, SPARE - first)
                        ring.add_at([(first, size)], [(first, size)], ring.free.popleft())
                case "config":
                    assert isinstance(first, bytes)
                    with contextlib.suppress(ValueError, NotImplementedError):  # Refused, in words.
                        device.write_config(number, first, 0)
                    if device.config_size:
                        assert len(device.read_config(0, device.config_size)) == device.config_size
                case "pause":
                    await slot.stop()
                    slot.start()
            await asyncio.sleep(0)
            for each in slot.rings:
                each.collect()
        for _ in range(5):
            await asyncio.sleep(0)
        assert slot.failures == []
        if isinstance(device, Console):
            assert len(device._answers) < 64
        elif isinstance(device, Vsock):
            assert len(device.connections) <= 8
            assert len(device._resets) < 64 + 8 + 16
        await slot.reset()
        assert slot.failures == []
    if isinstance(device, Vsock):
        device.close()
        Path(device.path).parent.rmdir()


@pytest.mark.parametrize("packed", [0, DeviceFeature.RING_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=60)
@given(script=steps)
def test_no_queue_is_stopped(name: str, packed: int, script: list[tuple[str, int, object, object]]) -> None:
    device = DEVICES[name]()
    asyncio.run(run(device, device.features & ~DeviceFeature.RING_PACKED | packed, script))
