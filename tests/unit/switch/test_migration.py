"""What a migration asks of a port: pages that the data path writes are logged, a guest that has moved is announced."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from vhost_user.wire_client import ACK, FEATURES, MEMORY_SIZE, RING_STEP, USER_BASE, Guest, address, state, u64

from switch.test_switch import read_pcap
from viaduct.switch.switch import Switch

LOG_ALL = 1 << 26
LOG_BYTES = MEMORY_SIZE // 4096 // 8
MAC = bytes.fromhex("020000000009")
USED = 0x3000
"""The used ring of `Guest.place`, from the ring's start."""


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 60 seconds"
        await asyncio.sleep(0.01)


@pytest.fixture
async def switch() -> AsyncIterator[Switch]:
    async with Switch() as switch:
        yield switch


async def connect(switch: Switch, tmp_path: Path, features: int = FEATURES) -> Guest:
    """A guest on a port of its own, with memory."""
    path = tmp_path / "vm.sock"
    await switch.add_port("vm", f"vhost-user:{path}")
    guest = Guest(str(path))
    await guest.negotiate(features)
    await guest.share()
    return guest


async def start_logged(guest: Guest, index: int) -> None:
    """Starts a ring whose used ring is logged where it lies."""
    start = index * RING_STEP
    place = address(
        index, USER_BASE + start, USER_BASE + start + USED, USER_BASE + start + 0x2000, flags=1, log=start + USED
    )
    assert await guest.ack(8, state(index, 256)) == ACK
    assert await guest.ack(9, place) == ACK
    assert await guest.ack(12, u64(index), [guest.event()]) == ACK
    assert await guest.ack(18, state(index, 1)) == ACK


def pages(log: int) -> set[int]:
    bits = int.from_bytes(os.pread(log, LOG_BYTES, 0), "little")
    return {page for page in range(8 * LOG_BYTES) if bits >> page & 1}


async def test_the_rings_of_a_port_are_logged(switch: Switch, tmp_path: Path) -> None:
    guest = await connect(switch, tmp_path, FEATURES | LOG_ALL)
    try:
        log = guest.memory(LOG_BYTES)
        await guest.ask(6, struct.pack("=QQ", LOG_BYTES, 0), [log])
        assert pages(log) == set()
        for index in (0, 1):
            await start_logged(guest, index)
        # The flags by which we ask for notifications, and whatever else was written before the log was there.
        assert pages(log) == {(index * RING_STEP + USED) // 4096 for index in (0, 1)}
        for index in (0, 1):
            await guest.ask(11, state(index, 0))
        os.pwrite(log, bytes(LOG_BYTES), 0)
        await asyncio.sleep(0.05)
        assert pages(log) == set(), "nothing is written when the rings have stopped"
    finally:
        guest.close()


async def test_a_cut_log_costs_its_front_end_the_connection_and_nobody_else(switch: Switch, tmp_path: Path) -> None:
    guest = await connect(switch, tmp_path, FEATURES | LOG_ALL)
    try:
        log = guest.memory(LOG_BYTES)
        await guest.ask(6, struct.pack("=QQ", LOG_BYTES, 0), [log])
        os.ftruncate(log, 0)
        try:
            await start_logged(guest, 0)
        except (EOFError, ConnectionResetError, BrokenPipeError):
            pass  # The poller may be the faster one.
        else:
            assert await guest.closed()
        await until(lambda: switch.ports()[0].peer is None)
        again = Guest(str(tmp_path / "vm.sock"))
        await again.negotiate()
        again.close()
    finally:
        guest.close()


async def test_a_guest_that_has_moved_is_announced(switch: Switch, tmp_path: Path) -> None:
    recorded = tmp_path / "out.pcap"
    await switch.add_port("recorder", f"pcap:,out={recorded}")
    guest = await connect(switch, tmp_path)
    try:
        assert await guest.ack(19, MAC + b"\0\0") == ACK
        await until(lambda: len(read_pcap(recorded)) == 1)
    finally:
        guest.close()
    # A reverse request, as RFC 903 draws it: from the guest, to all, for its own address.
    request = b"\x00\x01\x08\x00\x06\x04\x00\x03" + MAC + bytes(4) + MAC + bytes(4)
    assert read_pcap(recorded) == [(b"\xff" * 6 + MAC + b"\x80\x35" + request).ljust(60, b"\0")]


async def test_an_announced_guest_is_found_at_its_port(switch: Switch, tmp_path: Path) -> None:
    guest = await connect(switch, tmp_path)
    try:
        assert await guest.ack(19, MAC + b"\0\0") == ACK
        (entry,) = switch.macs()
        assert (entry.mac, entry.port) == ("02:00:00:00:00:09", "vm")
    finally:
        guest.close()
