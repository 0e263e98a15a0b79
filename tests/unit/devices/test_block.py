"""The block device, from the driver's side: both ring layouts, io_uring and threads, raw and qcow2."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.disk_driver import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTOR,
    UNMAP,
    UNSUPP,
    WRITE_ZEROES,
    Disk,
    header,
    segment,
)
from devices.slot import Slot, until
from viaduct.devices.block import BlockDevice, ImageError
from viaduct.vhost_user import RequestError
from viaduct.virtio import BlockFeature, DeviceFeature
from viaduct.virtio.block_config import WRITEBACK, BlockConfig

SIZE = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, SIZE)
    return path


@pytest.fixture(params=["io_uring", "threads"])
def device(request: pytest.FixtureRequest, image: Path) -> Iterator[BlockDevice]:
    device = BlockDevice(image, serial="disk-0", io_uring=request.param == "io_uring")
    yield device
    device.close()


def content_of(path: Path) -> bytes:
    """All bytes of a file."""
    return path.read_bytes()


def fill(path: Path, content: bytes) -> None:
    """Makes a file with this content."""
    path.write_bytes(content)


def run_text(*words: str) -> str:
    """What a command prints."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def status_of(path: Path) -> os.stat_result:
    """Size and blocks of a file."""
    return path.stat()


@pytest.mark.parametrize("packed", [0, DeviceFeature.RING_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("event_idx", [0, DeviceFeature.EVENT_IDX], ids=["flags", "event_idx"])
async def test_what_was_written_is_read(device: BlockDevice, image: Path, packed: int, event_idx: int) -> None:
    features = device.features & ~(DeviceFeature.RING_PACKED | DeviceFeature.EVENT_IDX)
    async with Slot(device, features | packed | event_idx) as slot:
        disk = Disk(slot.rings[0])
        content = {sector: os.urandom(SECTOR) for sector in random.sample(range(SIZE // SECTOR), 200)}
        for sector, data in content.items():
            await disk.write(sector, data)
        assert (await disk.ask(FLUSH))[0] == OK
        for sector, data in content.items():
            assert content_of(image)[sector * SECTOR :][:SECTOR] == data
        for start in range(0, 100, 20):  # Three descriptors each, in a ring of 64.
            chosen = list(content)[start : start + 20]
            assert await disk.read_all(chosen) == [content[sector] for sector in chosen]
        assert await disk.ask(GET_ID, room=20) == (OK, b"disk-0".ljust(20, b"\0"))
    stats = device.stats()
    assert (stats["reads"], stats["writes"], stats["flushes"]) == (100, 200, 1)
    assert (stats["bytes_written"], stats["failed"], stats["refused"]) == (200 * SECTOR, 0, 0)


async def test_data_in_pieces_of_any_size(device: BlockDevice) -> None:
    async with Slot(device) as slot:
        data = os.urandom(4 * SECTOR)
        parts = [header(OUT, 3)[:5], header(OUT, 3)[5:] + data[:1], data[1:700], data[700:]]
        assert await slot.rings[0].ask(parts, 1) == bytes([OK])
        answer = await slot.rings[0].ask([header(IN, 3)[:1], header(IN, 3)[1:]], [1, 2, 509, 3 * SECTOR, 1])
        assert answer == data + bytes([OK])
        # The status in one piece with the data.
        assert await slot.rings[0].ask(header(IN, 3), 4 * SECTOR + 1) == data + bytes([OK])


async def test_discard_and_zeroes(device: BlockDevice, image: Path) -> None:
    async with Slot(device) as slot:
        disk = Disk(slot.rings[0])
        full = b"\xaa" * SECTOR * 8
        for sector in range(0, 256, 8):
            await disk.write(sector, full)
        assert (await disk.ask(FLUSH))[0] == OK
        blocks = status_of(image).st_blocks
        assert (await disk.ask(DISCARD, out=segment(0, 64) + segment(128, 64)))[0] == OK
        assert (await disk.ask(FLUSH))[0] == OK
        assert status_of(image).st_blocks < blocks
        assert await disk.read(64, 8) == full
        assert (await disk.ask(WRITE_ZEROES, out=segment(64, 3)))[0] == OK
        assert (await disk.ask(WRITE_ZEROES, out=segment(192, 16, UNMAP) + segment(255, 1)))[0] == OK
        assert await disk.read(64, 8) == bytes(3 * SECTOR) + full[: 5 * SECTOR]
        assert await disk.read(192, 8) == await disk.read(200, 8) == bytes(8 * SECTOR)
        assert await disk.read(254) == full[:SECTOR]
        assert await disk.read(255) == bytes(SECTOR)
        assert status_of(image).st_size == SIZE


LAST = SIZE // SECTOR

WRONG = [
    (header(IN, LAST), [SECTOR, 1], IOERR, "the disk has 16384"),
    (header(IN, LAST - 1), [2 * SECTOR, 1], IOERR, "2 sectors from 16383 on"),
    (header(IN, 1 << 63), [SECTOR, 1], IOERR, "the disk has"),
    (header(IN, (1 << 64) - 1), [SECTOR, 1], IOERR, "the disk has"),
    (header(OUT, LAST) + bytes(SECTOR), [1], IOERR, "the disk has"),
    (header(IN), [SECTOR - 1, 1], IOERR, "a read of 511 bytes; multiples of 512"),
    (header(IN), [1], IOERR, "a read of 0 bytes"),
    (header(OUT), [1], IOERR, "a write of 0 bytes"),
    (header(OUT) + bytes(100), [1], IOERR, "a write of 100 bytes"),
    (header(2), [1], UNSUPP, "a request of type 2"),
    (header(14), [1], UNSUPP, "a request of type 14"),
    (header(0xFFFF_FFFF), [1], UNSUPP, "a request of type 4294967295"),
    (header(IN)[:15], [SECTOR, 1], IOERR, "a header of 15 bytes; it has 16"),
    (b"", [1], IOERR, "a header of 0 bytes"),
    (header(DISCARD), [1], IOERR, "0 bytes of segments; 1 to 64"),
    (header(DISCARD) + segment(0, 8)[:15], [1], IOERR, "15 bytes of segments"),
    (header(DISCARD) + segment(0, 8) * 65, [1], IOERR, "1040 bytes of segments"),
    (header(DISCARD) + segment(0, 8, UNMAP), [1], UNSUPP, "flags 0x1; 0x0 are known"),
    (header(DISCARD) + segment(LAST, 1), [1], IOERR, "the disk has"),
    (header(DISCARD) + segment(0, 1 << 31), [1], IOERR, "2147483648 sectors; 2097152 are allowed"),
    (header(WRITE_ZEROES) + segment(0, 8, 2), [1], UNSUPP, "flags 0x2; 0x1 are known"),
    (header(WRITE_ZEROES) + segment(0, 65537), [1], IOERR, "65537 sectors; 65536 are allowed"),
    (header(WRITE_ZEROES) + segment((1 << 64) - 1, 1), [1], IOERR, "the disk has"),
]


@pytest.mark.parametrize(("out", "rooms", "status", "message"), WRONG)
async def test_a_wrong_request_is_answered_and_told(
    device: BlockDevice,
    caplog: pytest.LogCaptureFixture,
    image: Path,
    out: bytes,
    rooms: list[int],
    status: int,
    message: str,
) -> None:
    async with Slot(device) as slot:
        answer = await slot.rings[0].ask(out, rooms)
        assert answer[-1] == status
        await until(lambda: message in caplog.text, message)
        await Disk(slot.rings[0]).write(0, b"x" * SECTOR)
        assert not slot.failures
    assert device.stats()["refused"] == 1
    assert content_of(image).strip(b"\0") == b"x" * SECTOR


async def test_a_request_without_a_place_for_its_status_comes_back(
    device: BlockDevice, caplog: pytest.LogCaptureFixture
) -> None:
    async with Slot(device) as slot:
        assert await slot.rings[0].ask(header(OUT) + bytes(SECTOR)) == b""
        await until(lambda: "a request with 528 bytes to read and none to write" in caplog.text)
        await Disk(slot.rings[0]).read(0)


async def test_a_flood_of_wrong_requests_is_told_in_few_lines(
    device: BlockDevice, caplog: pytest.LogCaptureFixture
) -> None:
    async with Slot(device) as slot:
        for _ in range(1000):
            await slot.rings[0].ask(header(77), 1)
    assert device.stats()["refused"] == 1000
    assert 0 < len(caplog.records) < 200


async def test_a_broken_ring_stops_its_queue_only(image: Path) -> None:
    device = BlockDevice(image, queues=2)
    async with Slot(device) as slot:
        first, second = slot.rings
        slot.memory.write(first.addresses[1] + 2, (5000).to_bytes(2, "little"))
        os.eventfd_write(first.kick_fd, 1)
        await until(lambda: slot.failures)
        assert slot.failures[0][0] == 0
        assert "5000" in slot.failures[0][1]
        await Disk(second).read(0)
    device.close()


async def test_memory_that_was_cut_ends_the_connection(device: BlockDevice) -> None:
    slot = Slot(device, spare=1 << 20)
    async with slot:
        token = slot.rings[0].add([header(IN, 0)], [SECTOR, 1], kick=False)
        assert token == 0
        slot.rings[0].core.kick()
        os.truncate(slot.memory_fd, 0)
        os.eventfd_write(slot.rings[0].kick_fd, 1)
        await until(lambda: slot.broken)
        assert "was cut" in slot.broken


async def test_a_read_only_disk(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(image, b"content!" * (SIZE // 8))
    device = BlockDevice(image, read_only=True)
    assert device.features & BlockFeature.RO
    assert not device.features & (BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES)
    async with Slot(device) as slot:
        disk = Disk(slot.rings[0])
        assert (await disk.ask(OUT, 0, bytes(SECTOR)))[0] == IOERR
        assert (await disk.ask(DISCARD, 0, segment(0, 8)))[0] == UNSUPP
        assert (await disk.ask(FLUSH))[0] == OK
        assert await disk.read(7) == b"content!" * 64
        await until(lambda: "a write request to a read-only disk" in caplog.text)
    device.close()
    assert content_of(image) == b"content!" * (SIZE // 8)


async def test_a_file_that_shrinks(device: BlockDevice, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Slot(device) as slot:
        disk = Disk(slot.rings[0])
        await disk.write(0, b"x" * SECTOR)
        os.truncate(image, 4096)
        assert (await disk.ask(IN, 8, room=SECTOR))[0] == IOERR
        assert (await disk.ask(IN, 7, room=2 * SECTOR))[0] == IOERR
        assert await disk.read(0) == b"x" * SECTOR
        await until(lambda: "the file has shrunk: it ends before byte 4608" in caplog.text)
        assert device.stats()["failed"] == 2


async def test_a_last_sector_that_is_not_full(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    fill(path, b"y" * (SECTOR + 100))
    for io_uring in (True, False):
        device = BlockDevice(path, io_uring=io_uring, read_only=True)
        assert device.size == 2 * SECTOR
        async with Slot(device) as slot:
            assert await Disk(slot.rings[0]).read(0, 2) == b"y" * (SECTOR + 100) + bytes(SECTOR - 100)
        device.close()


async def test_configuration_and_write_through(device: BlockDevice) -> None:
    config = BlockConfig.unpack(device.read_config(0, 256))
    assert (config.capacity, config.blk_size, config.num_queues, config.writeback) == (LAST, SECTOR, 1, 1)
    assert device.read_config(0, 4096)[device.config_size :].strip(b"\0") == b""
    assert device.read_config(WRITEBACK, 1) == b"\1"
    with pytest.raises(RequestError, match="without VIRTIO_BLK_F_CONFIG_WCE"):
        device.write_config(WRITEBACK, b"\0", 0)
    async with Slot(device) as slot:
        for offset, data in ((0, b"\0"), (WRITEBACK, b"\0\0"), (WRITEBACK - 1, b"\0\0"), (1 << 40, b"\0")):
            with pytest.raises(RequestError, match="the byte at offset 32"):
                device.write_config(offset, data, 0)
        with pytest.raises(RequestError, match="`writeback` 2"):
            device.write_config(WRITEBACK, b"\2", 0)
        device.write_config(WRITEBACK, b"\0", 0)
        assert device.read_config(WRITEBACK, 1) == b"\0"
        disk = Disk(slot.rings[0])
        await disk.write(5, b"w" * SECTOR)
        assert (await disk.ask(DISCARD, out=segment(64, 8)))[0] == OK
        assert await disk.read(5) == b"w" * SECTOR
        device.write_config(0, device.config.pack()[:WRITEBACK] + b"\1", 1)
        assert device.write_back
        device.write_config(WRITEBACK, b"\0", 0)
        device.set_status(0)
        assert device.write_back


def dirty_pages(path: Path) -> int | None:
    """Pages of a file that the host has not written back; None before Linux 6.5, which cannot say (cachestat(2))."""
    cachestat = 451
    whole, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    fd = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None).syscall(cachestat, fd, whole, found, 0):
            return None
    finally:
        os.close(fd)
    return found[1] + found[2]  # dirty, and being written


async def test_what_was_flushed_is_on_the_disk(device: BlockDevice, image: Path) -> None:
    if dirty_pages(image) is None or run_text("stat", "--file-system", "--format=%T", str(image)) == "tmpfs":
        pytest.skip("this kernel does not say what it has written back, or the file is in memory only")
    async with Slot(device) as slot:
        disk = Disk(slot.rings[0])
        for sector in range(0, 1024, 8):
            await disk.write(sector, b"f" * 8 * SECTOR)
        assert (await disk.ask(FLUSH))[0] == OK
        assert dirty_pages(image) == 0
        device.write_config(WRITEBACK, b"\0", 0)
        for sector in range(0, 256, 8):
            await disk.write(sector, b"g" * 8 * SECTOR)
            assert dirty_pages(image) == 0
        assert (await disk.ask(WRITE_ZEROES, out=segment(0, 3)))[0] == OK
        assert dirty_pages(image) == 0


async def test_a_queue_stops_and_goes_on(device: BlockDevice) -> None:
    async with Slot(device) as slot:
        for round_number in range(20):
            disk = Disk(slot.rings[0])
            await disk.write(round_number, bytes([round_number]) * SECTOR)
            await slot.stop()
            slot.start()
            assert await disk.read(round_number) == bytes([round_number]) * SECTOR
        await slot.reset()
        await Disk(slot.rings[0]).read(0)


async def test_a_disabled_queue_waits(device: BlockDevice) -> None:
    async with Slot(device) as slot:
        device.enable_queue(0, False)
        slot.rings[0].add(header(IN), [SECTOR, 1])
        os.eventfd_write(slot.rings[0].kick_fd, 1)
        assert not slot.rings[0].used
        device.enable_queue(0, True)
        assert (await slot.rings[0].next_used())[1][-1] == OK


async def test_memory_is_replaced_under_running_queues(device: BlockDevice) -> None:
    async with Slot(device) as slot:
        disk = Disk(slot.rings[0])
        for number in range(50):
            tokens = [slot.rings[0].add([header(IN, n)], [SECTOR, 1]) for n in range(8)]
            device.set_memory(slot.memory)
            came = [await slot.rings[0].next_used() for _ in tokens]
            assert all(data[-1] == OK for _, data in came)
            await disk.write(number, bytes([number]) * SECTOR)


def test_what_is_no_disk(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty", tmp_path / "short.qcow2"
    empty.touch()
    short.write_bytes(b"QFI\xfb\0\0\0\3")
    os.mkfifo(tmp_path / "pipe")
    for path, complaint in (
        (tmp_path / "missing", "No such file or directory.*make one first"),
        (empty, "is empty; give it a size first"),
        (tmp_path, "Is a directory"),
        (Path("/dev/null"), "is a character device; a disk lies in a regular file or a block device"),
        (tmp_path / "pipe", "is a pipe"),
        (short, "its header ends after 8 bytes"),
    ):
        with pytest.raises(ImageError, match=complaint):
            BlockDevice(path)
    with pytest.raises(ValueError, match="more than 20 bytes"):
        BlockDevice(empty, serial="x" * 21)
    with pytest.raises(ValueError, match="0 queues; 1 to 256"):
        BlockDevice(empty, queues=0)


async def test_an_inflight_record_has_requests_repeated(image: Path) -> None:
    from viaduct.vhost_user import Inflight

    device = BlockDevice(image)
    device.set_features(device.features & ~DeviceFeature.RING_PACKED)
    fd, size, offset = device.get_inflight(1, 64)
    device.set_inflight(Inflight(fd, size, offset, 1, 64))
    os.close(fd)
    async with Slot(device) as slot:
        disk = Disk(slot.rings[0])
        for number in range(100):
            await disk.write(number, bytes([number]) * SECTOR)
        await slot.stop()
        slot.start()
        assert await disk.read(99) == bytes([99]) * SECTOR
    device.close()
