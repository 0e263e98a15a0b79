"""The balloon, from the driver's side: what it does to the file behind the guest's memory."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import struct
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.slot import PLACE, Slot, until
from viaduct._core import GuestMemory
from viaduct.devices.balloon import DONE, NUMBERS_MAX, PAGE, Balloon, BalloonStatistic, _ranges
from viaduct.vhost_user.handover import Fds
from viaduct.virtio import BalloonFeature, DeviceFeature

SPARE = 64 * PAGE
ALL = BalloonFeature.STATS_VQ | BalloonFeature.REPORTING | BalloonFeature.PAGE_POISON | DeviceFeature.VERSION_1
SOON = 30.0


def pages(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def fill(slot: Slot) -> None:
    slot.memory.write(0, b"\xaa" * SPARE)


def present(slot: Slot) -> int:
    """Bytes of the memory's file that take up memory."""
    return os.fstat(slot.memory_fd).st_blocks * 512


@pytest.mark.parametrize("packed", [0, DeviceFeature.RING_PACKED], ids=["split", "packed"])
async def test_inflated_pages_leave_the_file(packed: int) -> None:
    device = Balloon()
    async with Slot(device, ALL | packed, spare=SPARE) as slot:
        fill(slot)
        inflate, deflate = slot.rings[:2]
        await inflate.ask(out=pages(0))
        slot.memory.write(inflate.place(0), bytes(4 * PLACE))  # From here on the pages of ring and buffers are there.
        before = present(slot)
        await inflate.ask(out=pages(5, 4, 3, 20, 5, 63))
        assert present(slot) == before - 5 * PAGE
        assert device.given_back == 6 * PAGE
        for number in range(1, 64):
            expected = b"\0" if number in (3, 4, 5, 20, 63) else b"\xaa"
            assert slot.memory.read(number * PAGE, PAGE) == expected * PAGE
        await deflate.ask(out=pages(20))
        slot.memory.write(20 * PAGE, b"used again")
        assert slot.memory.read(20 * PAGE, 12) == b"used again\0\0"


async def test_pages_that_do_not_exist() -> None:
    device = Balloon()
    async with Slot(device, ALL, spare=SPARE) as slot:
        fill(slot)
        end = slot.memory.regions[0][1] // PAGE
        await slot.rings[0].ask(out=pages(0xFFFFFFFF, end, end + 1, 7, 0xFFFFFFFE, end - 1))
        assert device.given_back == 2 * PAGE
        await slot.rings[0].ask(out=b"\1\2\3")
        await slot.rings[0].ask(room=16)
        await slot.rings[1].ask(out=pages(0xFFFFFFFF))
        assert device.given_back == 2 * PAGE
        assert not slot.failures


async def test_a_buffer_that_claims_too_much_is_cut() -> None:
    device = Balloon()
    async with Slot(device, ALL, spare=SPARE) as slot:
        ring = slot.rings[0]
        ring.add_at([(0, SPARE)] * 8, [], 3)
        await ring.next_used()
        assert NUMBERS_MAX * 4 < SPARE * 8
        assert not slot.failures


async def test_many_ranges_are_done_before_the_buffer_comes_back() -> None:
    device = Balloon()
    async with Slot(device, ALL, spare=2048 * PAGE) as slot:
        slot.memory.write(0, b"\xaa" * (2048 * PAGE))
        await slot.rings[0].ask(out=pages(*range(0, 2000, 2)))
        assert device.given_back == 1000 * PAGE
        # A pause in the middle of it does not lose any.
        slot.rings[0].add(out=pages(*range(1, 2001, 2)))
        await asyncio.sleep(0)
        await slot.stop()
        slot.start()
        await slot.rings[0].next_used()
        assert device.given_back == 2000 * PAGE


async def test_how_large_it_is_to_be() -> None:
    device = Balloon(size=10 * PAGE + 1)
    async with Slot(device, ALL) as slot:
        assert device.read_config(0, 16) == struct.pack("<IIII", 10, 0, 0, 0)
        resizing = asyncio.create_task(device.resize(300 * PAGE, SOON))
        await until(lambda: slot.config_changes == 1)
        assert device.target == 300 * PAGE
        device.write_config(4, struct.pack("<I", 100), 0)
        await asyncio.sleep(0)
        assert not resizing.done()
        device.write_config(0, struct.pack("<IIII", 300, 300, 0, 0), 0)  # All of it, as QEMU does.
        await resizing
        assert device.size == 300 * PAGE
        with pytest.raises(TimeoutError, match="has 1228800 bytes instead of 4096000"):
            await device.resize(1000 * PAGE, 0.01)
        device.write_config(0, struct.pack("<I", 5), 0)  # Not the driver's.
        assert device.target == 1000 * PAGE
        with pytest.raises(ValueError, match="which has 16"):
            device.write_config(13, bytes(4), 0)
        for size in (-1, PAGE << 32):
            with pytest.raises(ValueError, match="less than 16 TiB"):
                device.set_target(size)


def statistics(*values: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", tag, value) for tag, value in values)


async def test_statistics() -> None:
    device = Balloon()
    async with Slot(device, ALL) as slot:
        ring = slot.rings[2]
        ring.add(out=statistics((4, 1 << 30), (5, 2 << 30), (77, 1)))
        await until(lambda: device.statistics)
        assert device.statistics == {
            BalloonStatistic.FREE_MEMORY: 1 << 30,
            BalloonStatistic.TOTAL_MEMORY: 2 << 30,
        }
        assert not ring.arrived()
        for free in range(5):
            asking = asyncio.create_task(device.ask_statistics(SOON))
            await ring.next_used()
            ring.add(out=statistics((4, free)) + b"trailing")
            assert await asking == {BalloonStatistic.FREE_MEMORY: free}
        with pytest.raises(TimeoutError):
            await device.ask_statistics(0.01)


async def test_statistics_are_asked_for_before_there_is_a_driver() -> None:
    """Whoever asks then does not know yet which queue they will come by; the buffer is not lost."""
    device = Balloon()
    asking = asyncio.create_task(device.ask_statistics(SOON))
    await asyncio.sleep(0)
    async with Slot(device, ALL) as slot:
        ring = slot.rings[2]
        ring.add(out=statistics((4, 1)))
        await ring.next_used()
        ring.add(out=statistics((4, 2)))
        assert await asking == {BalloonStatistic.FREE_MEMORY: 2}


async def test_a_pause_gives_the_statistics_buffer_back() -> None:
    device = Balloon()
    async with Slot(device, ALL) as slot:
        ring = slot.rings[2]
        ring.add(out=statistics((4, 1)))
        await until(lambda: device.statistics)
        await slot.stop()
        await ring.next_used()
        ring.add(out=statistics((4, 2)))
        slot.start()
        await until(lambda: device.statistics[BalloonStatistic.FREE_MEMORY] == 2)


async def test_reported_pages_leave_the_file() -> None:
    device = Balloon()
    async with Slot(device, ALL, spare=SPARE) as slot:
        fill(slot)
        report = slot.rings[3]
        await report.ask(room=1)
        before = present(slot)
        report.add_at([], [(8 * PAGE, 4 * PAGE), (32 * PAGE, PAGE)], 5)
        await report.next_used()
        assert present(slot) == before - 5 * PAGE
        assert slot.memory.read(7 * PAGE, 6 * PAGE) == b"\xaa" * PAGE + bytes(4 * PAGE) + b"\xaa" * PAGE
        # Free pages that the guest fills with a pattern of its own must keep it.
        device.write_config(12, struct.pack("<I", 0xAA), 0)
        report.add_at([], [(16 * PAGE, PAGE)], 6)
        await report.next_used()
        assert slot.memory.read(16 * PAGE, PAGE) == b"\xaa" * PAGE


async def test_queues_are_counted_by_what_was_agreed_on() -> None:
    device = Balloon(hinting=True)
    assert device.queue_count == 5
    async with Slot(device, DeviceFeature.VERSION_1 | BalloonFeature.REPORTING, spare=SPARE, queues=3) as slot:
        fill(slot)
        slot.rings[2].add_at([], [(0, PAGE)], 5)
        await slot.rings[2].next_used()
        assert device.given_back == PAGE
    device = Balloon(reporting=False)
    assert device.queue_count == 3
    async with Slot(device, DeviceFeature.VERSION_1, spare=SPARE) as slot:
        fill(slot)
        slot.rings[2].add_at([], [(0, PAGE)], 5)
        await slot.rings[2].next_used()
        assert device.given_back == 0


async def test_a_round_of_hints() -> None:
    device = Balloon(hinting=True, reporting=False)
    async with Slot(device, spare=SPARE) as slot:
        fill(slot)
        hints = slot.rings[3]
        with pytest.raises(TimeoutError):
            await device.reclaim_hinted(0.01)
        for _ in range(2):
            before = device.given_back
            reclaiming = asyncio.create_task(device.reclaim_hinted(SOON))
            await until(lambda: device.config.free_page_hint_cmd_id >= 2)
            number = device.config.free_page_hint_cmd_id
            hints.add_at([], [(0, PAGE)], 5)  # Before the round: not counted.
            await hints.next_used()
            await hints.ask(out=struct.pack("<I", number - 1))  # Another round.
            hints.add_at([], [(0, PAGE)], 5)
            await hints.next_used()
            assert device.given_back == before
            await hints.ask(out=struct.pack("<I", number))
            for page in range(4):
                hints.add_at([], [(page * PAGE, PAGE)], 5)
                await hints.next_used()
            await hints.ask(out=struct.pack("<I", 0))
            assert await reclaiming == 4 * PAGE
            assert device.config.free_page_hint_cmd_id == DONE
            hints.add_at([], [(9 * PAGE, PAGE)], 5)
            await hints.next_used()
            assert slot.memory.read(9 * PAGE, 1) == b"\xaa"
    with pytest.raises(ValueError, match="hinting=True"):
        await Balloon().reclaim_hinted()


async def test_memory_that_is_sealed_is_left_alone_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    import fcntl

    device = Balloon()
    async with Slot(device, ALL, spare=SPARE) as slot:
        fill(slot)
        fcntl.fcntl(slot.memory_fd, fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE
        with caplog.at_level(logging.WARNING):
            for number in range(4):
                await slot.rings[0].ask(out=pages(number, 9))
        assert slot.memory.read(0, PAGE) == b"\xaa" * PAGE
        assert caplog.text.count("cannot be given back") == 1


async def test_what_is_saved_goes_on_elsewhere() -> None:
    before = Balloon(size=8 * PAGE)
    before.write_config(4, struct.pack("<I", 5), 0)
    after = Balloon()
    after.restore(json.loads(json.dumps(before.save(Fds()))), Fds())  # As a snapshot keeps it.
    async with Slot(after, ALL):
        assert after.config == (8, 5, 0, 0)


async def test_memory_that_is_private_is_left_alone() -> None:
    """A machine that goes on from a snapshot may have its memory from the snapshot's file, which must not change."""
    with tempfile.TemporaryFile() as file:
        file.write(b"\xaa" * 4 * PAGE)
        file.flush()
        memory = GuestMemory().with_region(0, 4 * PAGE, 0, 0, file.fileno(), True)
        with pytest.raises(PermissionError):
            memory.discard(0, 4 * PAGE)
        file.seek(0)
        assert file.read() == b"\xaa" * 4 * PAGE == memory.read(0, 4 * PAGE)


async def test_a_reset_empties_the_balloon_and_keeps_the_wish() -> None:
    device = Balloon(size=8 * PAGE)
    async with Slot(device, ALL) as slot:
        device.write_config(4, struct.pack("<I", 8), 0)
        device.write_config(12, struct.pack("<I", 1), 0)
        slot.rings[2].add(out=statistics((4, 1)))
        await until(lambda: device.statistics)
        await slot.reset()
        assert device.config == (8, 0, 0, 0)
        slot.rings[2].add(out=statistics((4, 9)))
        await until(lambda: device.statistics == {BalloonStatistic.FREE_MEMORY: 9})


@given(st.lists(st.integers(0, 40) | st.integers(0xFFFFFFF0, 0xFFFFFFFF)), st.binary(max_size=3))
def test_ranges_cover_each_number_once(numbers: list[int], rest: bytes) -> None:
    covered = [page for first, count in _ranges(pages(*numbers) + rest) for page in range(first, first + count)]
    assert covered == sorted(set(numbers))
