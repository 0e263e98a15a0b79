"""Capture files that are none, or not what they should be."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from viaduct.switch.config import ConfigError, PcapPort
from viaduct.switch.handover_format import PortData, PortPosition
from viaduct.switch.ports import make_port
from viaduct.switch.switch import Switch
from viaduct.vhost_user.handover import Fds

from .test_switch import ALICE, BROADCAST, ethernet, until

RAW_IP = 101
"""LINKTYPE_RAW: packets without an Ethernet header."""


def block(kind: int, body: bytes) -> bytes:
    """One block of a pcapng file."""
    size = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + size + body + size


def pcapng(link: int, frame: bytes, interface: int = 0) -> bytes:
    """A file with one interface and one packet."""
    section = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    packet = struct.pack("<IIIII", interface, 0, 0, len(frame), len(frame)) + frame + bytes(-len(frame) & 3)
    return section + block(1, struct.pack("<HHI", link, 0, 0)) + block(6, packet)


@pytest.mark.parametrize(("link", "interface", "words"), [(RAW_IP, 0, "only Ethernet"), (1, 7, "interface 7")])
async def test_packets_of_another_link(tmp_path: Path, link: int, interface: int, words: str) -> None:
    path = tmp_path / "in.pcapng"
    path.write_bytes(pcapng(link, ethernet(BROADCAST, ALICE, b"frame"), interface))
    async with Switch() as switch:
        await switch.add_port("sink", "null")
        await switch.add_port("player", f"pcap:{path}")
        await until(lambda: switch.ports()[1].link == "broken")
        assert words in (switch.ports()[1].detail or "")
        assert switch.stats().ports[0].frames("sent") == 0


async def test_only_what_was_replayed_meanwhile_is_read_when_a_port_has_been_taken_over(tmp_path: Path) -> None:
    """The hand-over's gap must not be as long as it takes to read a large file."""
    path, out = tmp_path / "in.pcap", tmp_path / "out.pcap"
    frames = [ethernet(BROADCAST, ALICE, b"frame %d" % number) for number in range(200)]
    header = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    records = [struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame for frame in frames]
    path.write_bytes(header + b"".join(records))
    async with Switch() as switch:
        switch.data_path.hold()
        await switch.add_port("sink", f"pcap:,out={out}")
        player = make_port(switch, "player", PcapPort(file=str(path)))
        await player.adopt(PortData(name="player", replayed=190), Fds())
        # Whoever began at the start once more would find something else.
        with path.open("r+b") as file:
            file.write(bytes(len(header) + sum(map(len, records[:150]))))
        player.resume(PortPosition(replayed=195))
        switch.data_path.resume()
        await until(lambda: switch.stats().ports[0].frames("sent") == 5)
        await until(lambda: out.read_bytes().count(b"frame 1") == 5)
        assert [number for number, frame in enumerate(frames) if frame in out.read_bytes()] == [*range(195, 200)]
        await player.close()


async def test_pipes_are_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with Switch() as switch:
        for text, key in ((f"pcap:{pipe}", "file"), (f"pcap:,out={pipe}", "out")):
            with pytest.raises(ConfigError) as raised:
                await switch.add_port("bad", text)
            assert raised.value.key == ("ports", "bad", key)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        with pytest.raises(ConfigError, match="regular file"):
            await switch.add_port("bad", f"pcap:,out={pipe}")
        os.close(reader)
        assert switch.ports() == ()
