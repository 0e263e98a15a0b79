"""A whole switch: ports come and go by `apply`, frames pass, errors name what cannot be had, nothing leaks."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from viaduct.switch.config import ConfigError, SwitchConfig, VhostUserPort, build_config
from viaduct.switch.status import Event, Frame, Statistics
from viaduct.switch.switch import Switch

BROADCAST = b"\xff" * 6
ALICE, BOB = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def ethernet(to: bytes, sender: bytes, payload: bytes) -> bytes:
    return (to + sender + b"\x88\xb5" + payload).ljust(60, b"\0")


def write_pcap(path: Path, frames: list[bytes], interval_us: int = 1000) -> Path:
    """A classic pcap file, written by hand from the format's description."""
    data = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    for index, frame in enumerate(frames):
        data += struct.pack("<IIII", 1000, index * interval_us, len(frame), len(frame)) + frame
    path.write_bytes(data)
    return path


def read_pcap(path: Path) -> list[bytes]:
    data = path.read_bytes()
    order = {b"\xa1\xb2\x3c\x4d": ">", b"\x4d\x3c\xb2\xa1": "<"}[data[:4]]
    frames, at = [], 24
    while at + 16 <= len(data):
        _, _, length, _ = struct.unpack_from(f"{order}IIII", data, at)
        frames.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return frames


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 20 seconds"
        await asyncio.sleep(0.01)


def drops(statistics: Statistics, port: str) -> dict[str, int]:
    (found,) = (each for each in statistics.ports if each.name == port)
    return found.drops()


async def test_a_recording_is_replayed_into_another(tmp_path: Path) -> None:
    frames = [ethernet(BROADCAST, ALICE, bytes([n]) * (n + 1)) for n in range(200)]
    replayed, recorded = write_pcap(tmp_path / "in.pcap", frames), tmp_path / "out.pcap"
    async with Switch() as switch:
        await switch.add_port("player", f"pcap:{replayed}")
        await asyncio.sleep(0.05)
        assert switch.stats().ports[0].frames("received") == 0, "nobody is there to hear it yet"
        await switch.add_port("recorder", f"pcap:,out={recorded}")
        await until(lambda: len(read_pcap(recorded)) == len(frames))
        (entry,) = switch.macs()
        assert (entry.mac, entry.port, entry.vlan) == ("02:00:00:00:00:01", "player", 0)
    assert read_pcap(recorded) == frames


async def test_pcapng_is_replayed_at_the_resolution_it_was_captured_with(tmp_path: Path) -> None:
    frame = ethernet(BROADCAST, ALICE, b"ng")
    body = struct.pack("<IIIII", 0, 0, 0, len(frame), len(frame)) + frame
    later = struct.pack("<IIIII", 0, 0, 100_000, len(frame), len(frame)) + frame  # 0.1 s in microseconds
    blocks = [
        (0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)),
        (1, struct.pack("<HHI", 1, 0, 0)),
        (6, body),
        (6, later),
    ]
    data = b"".join(
        struct.pack("<II", kind, len(content) + 12) + content + struct.pack("<I", len(content) + 12)
        for kind, content in blocks
    )
    replayed, recorded = tmp_path / "in.pcapng", tmp_path / "out.pcap"
    replayed.write_bytes(data)
    async with Switch() as switch:
        await switch.add_port("recorder", f"pcap:,out={recorded}")
        await switch.add_port("player", f"pcap:{replayed}")
        await until(lambda: len(read_pcap(recorded)) == 2)
    stamps = [struct.unpack_from(">II", recorded.read_bytes(), 24 + n * (16 + len(frame))) for n in range(2)]
    first, second = (seconds * 10**9 + nanoseconds for seconds, nanoseconds in stamps)
    assert second - first > 50_000_000, "not a thousand times faster"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "not a capture file"), (b"\0" * 100, "not a capture file"), (b"\x0a\x0d\x0d\x0a" + b"\xff" * 60, "capture")],
)
async def test_a_file_that_is_no_capture_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.pcap"
    path.write_bytes(content)
    async with Switch() as switch:
        with pytest.raises(ConfigError, match=words) as raised:
            await switch.add_port("player", f"pcap:{path}")
        assert str(path) in str(raised.value)
        assert raised.value.key == ("ports", "player", "file")
        assert switch.ports() == ()
        assert switch.config.ports == {}


async def test_a_damaged_recording_stops_its_port_with_an_event(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "in.pcap", [ethernet(BROADCAST, ALICE, b"good")])
    path.write_bytes(path.read_bytes() + struct.pack("<IIII", 1000, 0, 1 << 30, 1 << 30) + b"short")
    async with Switch() as switch:
        await switch.add_port("sink", "null")
        await switch.add_port("player", f"pcap:{path}")
        await until(lambda: switch.ports()[1].link == "broken")
        assert "damaged" in (switch.ports()[1].detail or "")
        assert switch.stats().ports[0].frames("sent") == 1, "the frame before the damage arrived"


async def test_apply_touches_only_what_differs(tmp_path: Path) -> None:
    first = build_config(
        {"ports": {"a": f"vhost-user:{tmp_path}/a.sock", "b": f"vhost-user:{tmp_path}/b.sock,vlan=10", "c": "null"}}
    )
    second = build_config(
        {"ports": {"b": f"vhost-user:{tmp_path}/b.sock,vlan=20", "c": "null", "d": f"vhost-user:{tmp_path}/a.sock"}}
    )
    async with Switch(first) as switch:
        b = os.stat(tmp_path / "b.sock").st_ino
        await switch.apply(second)
        assert switch.config == second
        assert os.stat(tmp_path / "b.sock").st_ino == b, "changed in place"
        assert sorted(port.name for port in switch.ports()) == ["b", "c", "d"]
        seen = await history(switch)
        assert [(event.kind, event.port) for event in seen[3:]] == [
            ("port-removed", "a"),
            ("port-changed", "b"),
            ("port-added", "d"),
        ]
        await switch.apply(second)
        assert len(await history(switch)) == len(seen), "the same again changes nothing"
    assert os.listdir(tmp_path) == []


async def history(switch: Switch) -> list[Event]:
    events = []
    stream = switch.events()
    while True:
        try:
            events.append(await asyncio.wait_for(anext(stream), 0.05))
        except TimeoutError:
            return events


async def expect_refusal(act: Callable[[], Awaitable[None]], *words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        await act()
    for word in words:
        assert word in str(raised.value)


async def test_what_cannot_be_had_is_refused_and_the_rest_stays(tmp_path: Path) -> None:
    live = tmp_path / "live.sock"
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.bind(str(live))
        somebody.listen()
        async with Switch() as switch:
            await switch.add_port("good", f"vhost-user:{tmp_path}/good.sock")
            for text, words in {
                f"vhost-user:{live}": ("ports.bad.path", str(live)),
                f"vhost-user:{tmp_path}/missing/x.sock": ("ports.bad.path", "missing"),
                f"vhost-user:{tmp_path}/good.sock": ("good",),
                f"pcap:{tmp_path}/missing.pcap": ("ports.bad.file", "missing.pcap"),
                f"pcap:,out={tmp_path}/missing/out.pcap": ("ports.bad.out", "missing"),
            }.items():
                await expect_refusal(lambda text=text: switch.add_port("bad", text), *words)  # type: ignore[misc]
            await expect_refusal(lambda: switch.add_port("good", "null"), "good", "exists already")
            await expect_refusal(lambda: switch.remove_port("goof"), "goof", "good")
            await expect_refusal(
                lambda: switch.apply(SwitchConfig(ports=switch.config.ports, polling="busy")), "polling"
            )
            assert [port.name for port in switch.ports()] == ["good"]
        assert live.exists(), "somebody's live socket is not touched"


async def test_pollers_on_a_cpu_that_is_not_there() -> None:
    await expect_refusal(Switch(SwitchConfig(pollers=(9999,))).__aenter__, "9999", "online")  # type: ignore[arg-type]


async def test_a_capture_shows_both_directions_until_it_is_left(tmp_path: Path) -> None:
    frames = [ethernet(BROADCAST, ALICE, bytes([n])) for n in range(20)]
    path = write_pcap(tmp_path / "in.pcap", frames, interval_us=20_000)
    async with Switch() as switch:
        await switch.add_port("sink", "null")
        captured: dict[str, list[Frame]] = {"player": [], "sink": []}

        async def follow(port: str) -> None:
            async for batch in switch.capture(port):
                captured[port] += batch

        await switch.add_port("player", f"pcap:{path}")
        tasks = [asyncio.create_task(follow(port)) for port in captured]
        await until(lambda: all(len(seen) >= 10 for seen in captured.values()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for port, direction in (("player", "received"), ("sink", "sent")):
            assert {frame.direction for frame in captured[port]} == {direction}
            assert all(frame.data in frames and frame.length == len(frame.data) for frame in captured[port])


async def test_captures_of_one_port_do_not_disturb_each_other_and_end_with_it(tmp_path: Path) -> None:
    frames = [ethernet(BROADCAST, ALICE, bytes([n])) for n in range(100)]
    path = write_pcap(tmp_path / "in.pcap", frames, interval_us=10_000)
    async with Switch() as switch:
        await switch.add_port("sink", "null")
        seen: list[list[Frame]] = [[], []]

        async def follow(captured: list[Frame]) -> None:
            async for batch in switch.capture("sink"):
                captured += batch

        first, second = (asyncio.create_task(follow(captured)) for captured in seen)
        await asyncio.sleep(0.01)
        await switch.add_port("player", f"pcap:{path}")
        await until(lambda: all(seen))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        before = len(seen[1])
        await until(lambda: len(seen[1]) > before + 2)
        await switch.remove_port("sink")
        await asyncio.wait_for(second, 10)


async def test_counters_say_why_a_frame_went_no_further(tmp_path: Path) -> None:
    frames = [
        ethernet(BROADCAST, ALICE, b"flooded"),
        ethernet(ALICE, BOB, b"to itself, once learned"),
        ethernet(BROADCAST, b"\x01" + ALICE[1:], b"from a group"),
        ethernet(bytes.fromhex("0180c2000003"), ALICE, b"to the bridge"),
        b"\xff" * 10,
    ]
    path = write_pcap(tmp_path / "in.pcap", frames)
    async with Switch() as switch:
        await switch.add_port("down", f"vhost-user:{tmp_path}/down.sock")
        await switch.add_port("player", f"pcap:{path}")
        await switch.add_port("sink", "null")
        expected = {"no_destination": 1, "bad_source": 1, "reserved_group": 1, "runt": 1}
        await until(lambda: drops(switch.stats(), "player") == expected)
        assert drops(switch.stats(), "down") == {}, "a port that is down does not miss floods"
        assert switch.stats().ports[2].frames("sent") == 1


async def test_addresses_are_forgotten_in_time(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "in.pcap", [ethernet(BROADCAST, ALICE, b"once")])
    async with Switch(SwitchConfig(mac_ageing=0.3)) as switch:
        await switch.add_port("sink", "null")
        await switch.add_port("player", f"pcap:{path}")
        await until(lambda: len(switch.macs()) == 1)
        await until(lambda: switch.macs() == ())


async def test_guests_in_this_process_are_ports_too() -> None:
    async with Switch() as switch:
        async with (
            switch.guest("alice", ip="10.0.0.1/24") as alice,
            switch.guest("bob", ip="10.0.0.2/24", queues=2, ring="packed"),
        ):
            assert [(port.name, port.link) for port in switch.ports()] == [("alice", "up"), ("bob", "up")]
            answer = await alice.ping("10.0.0.2", count=3, interval=0.01)
            assert (answer.sent, answer.received) == (3, 3)
        assert switch.ports() == ()


def resources() -> tuple[int, int, int]:
    """File descriptors, threads and mapped files of this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = sum(1 for line in maps if "memfd" in line)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), files


async def test_nothing_leaks(tmp_path: Path) -> None:
    async def once() -> None:
        async with Switch(SwitchConfig(pollers=(0,))) as switch:
            for n in range(8):
                await switch.add_port(f"p{n}", VhostUserPort(path=f"{tmp_path}/{n}.sock", queues=2))
            for n in range(0, 8, 2):
                await switch.remove_port(f"p{n}")

    await once()
    before = resources()
    for _ in range(5):
        await once()
    assert resources() == before
    assert os.listdir(tmp_path) == []
