"""Captures as pcapng, read back block by block as the format's specification lays them out."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from viaduct.switch.pcapng import PcapngEncoder
from viaduct.switch.status import Frame

frames = st.lists(
    st.builds(
        Frame,
        time_ns=st.integers(0, 2**63 - 1),
        port=st.sampled_from(("vm1", "vm2", "a-much-longer-name")),
        direction=st.sampled_from(("received", "sent")),
        length=st.integers(0, 65535),
        data=st.binary(max_size=200),
    ),
    max_size=10,
)


def blocks(data: bytes) -> list[tuple[int, bytes]]:
    """Type and body of every block; the length stands at both ends and is a multiple of four."""
    found = []
    while data:
        kind, size = struct.unpack_from("<II", data)
        assert size % 4 == 0
        assert struct.unpack_from("<I", data, size - 4)[0] == size
        found.append((kind, data[8 : size - 4]))
        data = data[size:]
    return found


def options(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        code, size = struct.unpack_from("<HH", data)
        if code == 0:
            break
        found[code] = data[4 : 4 + size]
        data = data[4 + size + (-size & 3) :]
    return found


def read(data: bytes) -> list[Any]:
    (kind, section), *rest = blocks(data)
    assert kind == 0x0A0D0D0A
    assert struct.unpack_from("<IHHq", section) == (0x1A2B3C4D, 1, 0, -1)
    names: list[str] = []
    found = []
    for kind, body in rest:
        if kind == 1:
            assert struct.unpack_from("<HHI", body) == (1, 0, 0)
            described = options(body[8:])
            assert described[9] == b"\x09"
            names.append(described[2].decode())
        else:
            assert kind == 6
            interface, high, low, kept, length = struct.unpack_from("<IIIII", body)
            flags = int.from_bytes(options(body[20 + kept + (-kept & 3) :])[2], "little")
            direction = {1: "received", 2: "sent"}[flags & 3]
            found.append(Frame(high << 32 | low, names[interface], direction, length, body[20 : 20 + kept]))  # type: ignore[arg-type]
    return found


@given(frames)
def test_reads_back(given_frames: list[Frame]) -> None:
    encoder = PcapngEncoder()
    assert read(encoder.header() + b"".join(map(encoder.frame, given_frames))) == given_frames
