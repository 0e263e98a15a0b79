"""Which buffers are the device's, read from a ring in any state that drivers and devices leave it in."""

from __future__ import annotations

import os
import struct

import pytest

from viaduct.guest.ring_memory import held
from viaduct.vhost_user import Queue

SIZE = 8
MARKS = {"A": 1 << 7, "a": 1 << 15, "U": 1 << 7 | 1 << 15, "u": 0}
"""Of a packed descriptor: available and used in laps with the wrap counter 1 (capital letters) and 0."""


@pytest.mark.parametrize(
    ("marks", "buffers"),
    [
        ("uuuuuuuu", []),  # new
        ("AAAuuuuu", [0, 1, 2]),
        ("AAAAAAAA", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("UUUUAAuu", [4, 5]),
        ("aaUUUUAA", [6, 7, 0, 1]),
        ("aaaaaAAA", [5, 6, 7, 0, 1, 2, 3, 4]),
        ("aaaAUUAA", [3, 4, 5, 6, 7, 0, 1, 2]),  # a device was killed: it has not shown 4 and 5
        ("UUAUUAuu", [2, 3, 4, 5]),
        ("UUAAuAuu", []),  # the driver has not shown 5
    ],
)
def test_packed(marks: str, buffers: list[int]) -> None:
    memory = os.memfd_create("ring")
    try:
        ring = [struct.pack("<QIHH", 0x1000, 64, buffer, MARKS[mark]) for buffer, mark in enumerate(marks)]
        os.pwrite(memory, b"".join(ring), 64)
        assert held(memory, Queue(0, SIZE, 64, 512, 576, 0, -1, -1), packed=True) == buffers
    finally:
        os.close(memory)


def test_split() -> None:
    memory = os.memfd_create("ring")
    try:
        available = struct.pack("<HH8H", 0, 2, 7, 6, 5, 4, 3, 2, 1, 0)
        os.pwrite(memory, available, 256)
        os.pwrite(memory, struct.pack("<HH", 0, 0xFFFE), 512)
        assert held(memory, Queue(0, SIZE, 0, 256, 512, 0, -1, -1), packed=False) == [1, 0, 7, 6]
    finally:
        os.close(memory)
