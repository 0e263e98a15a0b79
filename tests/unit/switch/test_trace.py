"""What a trace shows of packets: descriptors, headers, one line of the frame, and where it went."""

from __future__ import annotations

import asyncio
import struct
from contextlib import aclosing
from pathlib import Path

import pytest

from viaduct.guest import Guest
from viaduct.switch.config import ConfigError
from viaduct.switch.packet_summary import describe_frame, describe_header
from viaduct.switch.switch import Switch
from viaduct.switch.trace import Packet


async def traced(switch: Switch, port: str, count: int) -> list[Packet]:
    async with aclosing(switch.trace(port, count)) as packets:
        return [packet async for packet in packets]


@pytest.mark.parametrize("ring", ["split", "packed"])
async def test_an_echo_is_followed_in_both_directions(tmp_path: Path, ring: str) -> None:
    async with Switch() as switch:
        for name in ("a", "b"):
            await switch.add_port(name, f"vhost-user:{tmp_path}/{name}.sock")
        async with (
            Guest(f"{tmp_path}/a.sock", ip="10.0.0.1/24", ring=ring) as alice,
            Guest(f"{tmp_path}/b.sock", ip="10.0.0.2/24", ring=ring),
        ):
            pinging = asyncio.create_task(alice.ping("10.0.0.2", count=3, interval=0.05, wait=30))
            asked = answered = None
            async with asyncio.timeout(60), aclosing(switch.trace("a", 1000)) as packets:
                async for packet in packets:
                    if "echo request" in packet.frame:
                        asked = packet
                    if "echo reply" in packet.frame:
                        answered = packet
                    if asked and answered:
                        break
            assert (await pinging).received == 3
    assert asked is not None
    assert asked.direction == "received"
    assert asked.queue == 1
    assert "IPv4 10.0.0.1 > 10.0.0.2, ICMP echo request" in asked.frame
    assert asked.outcome == "to port b, queue 0"
    assert asked.length == 12 + 14 + 20 + 8 + 56
    assert sum(each.length for each in asked.descriptors if "indirect" not in each.flags) == asked.length
    assert not any("write" in each.flags for each in asked.descriptors)
    assert answered is not None
    assert answered.direction == "sent"
    assert answered.queue == 0
    assert "IPv4 10.0.0.2 > 10.0.0.1, ICMP echo reply" in answered.frame
    assert answered.outcome == "written into these buffers"
    assert "write" in answered.descriptors[-1].flags


async def test_a_dropped_packet_says_why(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock,mac=52:54:00:00:00:01,spoofcheck")
        tracing = asyncio.create_task(traced(switch, "a", 1))
        await asyncio.sleep(0)
        async with Guest(f"{tmp_path}/a.sock", ip="10.0.0.1/24", mac="02:00:00:00:00:05"):
            (packet,) = await asyncio.wait_for(tracing, 30)
    assert packet.outcome == "dropped: spoofed"
    assert packet.frame.startswith("02:00:00:00:00:05 > ")


async def test_a_trace_ends_with_its_port(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock")
        tracing = asyncio.create_task(traced(switch, "a", 5))
        await asyncio.sleep(0)
        await switch.remove_port("a")
        assert await asyncio.wait_for(tracing, 30) == []


async def test_only_ports_with_rings_are_traced() -> None:
    async with Switch() as switch:
        await switch.add_port("hole", "null")
        with pytest.raises(
            ConfigError, match="a null port has no rings to look into; its frames: viaduct capture hole"
        ):
            await traced(switch, "hole", 1)
        with pytest.raises(ConfigError, match="unknown port"):
            await traced(switch, "a", 1)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (bytes(12), "no offload"),
        (struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0), "checksum to be written at 34+16"),
        (struct.pack("<BBHHHHH", 2, 0, 0, 0, 0, 0, 3), "checksum verified, in 3 buffers"),
        (
            struct.pack("<BBHHHHH", 1, 0x81, 54, 1448, 34, 16, 1),
            "checksum to be written at 34+16, segments of 1448 bytes (TCPv4 with ECN), headers 54 bytes",
        ),
        (b"abc", "cut off after 3 bytes"),
    ],
)
def test_headers_in_words(header: bytes, said: str) -> None:
    assert describe_header(header) == said


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (b"", "0 bytes, too few for Ethernet"),
        (bytes(12) + b"\x88\xb5", "00:00:00:00:00:00 > 00:00:00:00:00:00, ethertype 0x88b5"),
        (bytes(12) + b"\x81\x00\x20\x05\x08\x06", "00:00:00:00:00:00 > 00:00:00:00:00:00, vlan 5, ARP"),
        (
            bytes(12)
            + b"\x08\x00\x45"
            + bytes(8)
            + b"\x06\x00\x00\x0a\x00\x00\x01\x0a\x00\x00\x02"
            + struct.pack(">HHIIBB", 1234, 80, 0, 0, 0x50, 0x12)
            + bytes(6),
            "00:00:00:00:00:00 > 00:00:00:00:00:00, IPv4 10.0.0.1 > 10.0.0.2, TCP 1234 > 80 [SA]",
        ),
        (bytes(12) + b"\x86\xdd\x60", "00:00:00:00:00:00 > 00:00:00:00:00:00, IPv6, cut off"),
    ],
)
def test_frames_in_a_line(frame: bytes, said: str) -> None:
    assert describe_frame(frame) == said


@pytest.mark.parametrize("length", range(0, 90, 3))
def test_a_frame_that_is_cut_off_anywhere_is_described(length: int) -> None:
    whole = bytes(12) + b"\x86\xdd\x60" + bytes(5) + b"\x06\x40" + bytes(32) + bytes(40)
    assert describe_frame(whole[:length])
