"""The buffer for requests in flight: layout, and recovery from a crash at any step."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhost_user.wire_client import memfd
from viaduct.vhost_user import Inflight, RequestError
from viaduct.vhost_user.inflight import InflightBuffer, SplitRegion, allocate, region_size


class DescStateSplit(ctypes.Structure):
    """As the document declares it."""

    _fields_ = (
        ("inflight", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 5),
        ("next", ctypes.c_uint16),
        ("counter", ctypes.c_uint64),
    )


class DescStatePacked(ctypes.Structure):
    _fields_ = (
        ("inflight", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
        ("next", ctypes.c_uint16),
        ("last", ctypes.c_uint16),
        ("num", ctypes.c_uint16),
        ("counter", ctypes.c_uint64),
        ("id", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
        ("len", ctypes.c_uint32),
        ("addr", ctypes.c_uint64),
    )


class QueueRegionSplit(ctypes.Structure):
    _fields_ = (
        ("features", ctypes.c_uint64),
        ("version", ctypes.c_uint16),
        ("desc_num", ctypes.c_uint16),
        ("last_batch_head", ctypes.c_uint16),
        ("used_idx", ctypes.c_uint16),
    )


class QueueRegionPacked(ctypes.Structure):
    _fields_ = (
        ("features", ctypes.c_uint64),
        ("version", ctypes.c_uint16),
        ("desc_num", ctypes.c_uint16),
        ("free_head", ctypes.c_uint16),
        ("old_free_head", ctypes.c_uint16),
        ("used_idx", ctypes.c_uint16),
        ("old_used_idx", ctypes.c_uint16),
        ("used_wrap_counter", ctypes.c_uint8),
        ("old_used_wrap_counter", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 7),
    )


@pytest.mark.parametrize("size", [1, 3, 256, 32768])
def test_sizes_are_those_of_the_c_structures(size: int) -> None:
    for packed, head, state in (
        (False, QueueRegionSplit, DescStateSplit),
        (True, QueueRegionPacked, DescStatePacked),
    ):
        exact = ctypes.sizeof(head) + size * ctypes.sizeof(state)
        assert region_size(size, packed=packed) == (exact + 63) // 64 * 64


def test_a_new_buffer_is_empty() -> None:
    fd, size, offset = allocate(2, 16, packed=False)
    assert (size, offset, os.fstat(fd).st_size) == (2 * region_size(16, packed=False), 0, size)
    with InflightBuffer(Inflight(fd, size, offset, 2, 16)) as buffer:
        os.close(fd)
        assert [region.recover(0) for region in buffer.regions] == [[], []]


def test_fields_lie_where_the_document_puts_them() -> None:
    fd, size, _ = allocate(1, 4, packed=False)
    with InflightBuffer(Inflight(fd, size, 0, 1, 4)) as buffer:
        (region,) = buffer.regions
        region.take(2)
        region.take(3)
        region.give_back([3])
        region.published([3], 9)
    data = os.pread(fd, size, 0)
    os.close(fd)
    head = QueueRegionSplit.from_buffer_copy(data)
    assert (head.version, head.desc_num, head.last_batch_head, head.used_idx) == (1, 4, 3, 9)
    states = (DescStateSplit * 4).from_buffer_copy(data, ctypes.sizeof(head))
    assert [(state.inflight, state.counter) for state in states] == [(0, 0), (0, 0), (1, 1), (0, 2)]


def test_a_buffer_that_is_too_small() -> None:
    fd = memfd(4096)
    with pytest.raises(RequestError, match="a buffer of 4096 bytes for 2 queues of 256; allowed: 8320 bytes or more"):
        InflightBuffer(Inflight(fd, 4096, 0, 2, 256))
    os.close(fd)


@pytest.mark.parametrize("offset", [0, 64, 4096, 5000 // 64 * 64])
def test_a_buffer_anywhere_in_its_file(offset: int) -> None:
    fd = memfd(65536)
    for expected in ([], [5]):
        with InflightBuffer(Inflight(fd, 8192, offset, 1, 16)) as buffer:
            assert buffer.regions[0].recover(0) == expected
            buffer.regions[0].take(5)
    os.close(fd)


@pytest.mark.parametrize("words", [(2, 16), (1, 8)], ids=["version", "size"])
def test_a_region_of_something_else(words: tuple[int, int]) -> None:
    fd = memfd(4096)
    os.pwrite(fd, words[0].to_bytes(2, "little") + words[1].to_bytes(2, "little"), 8)
    with pytest.raises(
        RequestError, match=f"version {words[0]} with {words[1]} descriptors; allowed: version 1 with 16"
    ):
        InflightBuffer(Inflight(fd, 4096, 0, 1, 16))
    os.close(fd)


@settings(deadline=None)
@given(junk=st.binary(min_size=8 + 16 * 16, max_size=8 + 16 * 16), used=st.integers(0, 0xFFFF))
def test_junk_is_refused_or_harmless(junk: bytes, used: int) -> None:
    fd = memfd(4096)
    os.pwrite(fd, bytes(8) + b"\1\0\20\0" + junk[4:], 0)
    heads: list[int] = []
    with contextlib.suppress(RequestError), InflightBuffer(Inflight(fd, 4096, 0, 1, 16)) as buffer:
        heads = buffer.regions[0].recover(used)
    os.close(fd)
    assert len(set(heads)) == len(heads) <= 16


class Crash(Exception):
    """The process dies here."""


class DyingMemory:
    """Memory whose process dies after a number of writes."""

    def __init__(self, region: SplitRegion, writes: int) -> None:
        self.left = writes
        self.put: Callable[..., None] = region._put
        self.put_state: Callable[..., None] = region._put_state
        region._put = self.write(self.put)  # type: ignore[method-assign]
        region._put_state = self.write(self.put_state)  # type: ignore[method-assign]

    def write(self, real: Callable[..., None]) -> Callable[..., None]:
        def put(*arguments: object) -> None:
            if not self.left:
                raise Crash
            self.left -= 1
            real(*arguments)

        return put


# Batches in which four chains that were fetched in the order 3, 1, 0, 2 are given back.
HISTORIES = ([[3], [1], [0], [2]], [[2, 0], [1, 3]], [[0, 1, 2, 3]])


@pytest.mark.parametrize("batches", HISTORIES, ids=str)
def test_recovery_after_every_write(batches: list[list[int]]) -> None:
    """Whichever write is the last one, recovery finds what the used ring does not have, in the order of fetching."""
    fetched = [3, 1, 0, 2]
    for writes in range(64):
        fd = memfd(4096)
        description = Inflight(fd, 4096, 0, 1, 4)
        used: list[int] = []
        taken: list[int] = []
        finished = False
        with InflightBuffer(description) as buffer:
            (region,) = buffer.regions
            DyingMemory(region, writes)
            try:
                for head in fetched:
                    region.take(head)
                    taken.append(head)
                for batch in batches:
                    region.give_back(batch)
                    used.extend(batch)  # The used ring's index moves: from here on the driver has them.
                    region.published(batch, len(used))
                finished = True
            except Crash:
                pass
        with InflightBuffer(description) as buffer:
            owed = buffer.regions[0].recover(len(used))
            assert owed == [head for head in taken if head not in used]
            assert buffer.regions[0].recover(len(used)) == owed
        os.close(fd)
        if finished:
            return
    pytest.fail("the history has more writes than were tried")
