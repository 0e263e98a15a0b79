"""The demonstration with guests in this process."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from viaduct import Switch
from viaduct.guest import Guest, Ping, Stream
from viaduct.switch.status import Statistics

from .demo_stage import Stage
from .output import count

ALICE, BOB = "10.0.0.1", "10.0.0.2"
FIRST_PING_PATIENCE = 10.0
"""Seconds."""


class Report(msgspec.Struct, kw_only=True):
    """What `--json` prints: everything that was measured, times in seconds."""

    first_reply_after: float
    """From the start of this process to the first answered ping."""
    ping: dict[str, Any]
    streams: list[dict[str, Any]]
    statistics: Statistics
    passed: bool


async def show(seconds: float, json: bool) -> bool:
    """Run the demonstration and print it. Returns whether everything that was sent arrived as it was."""
    with tempfile.TemporaryDirectory(prefix="viaduct-demo-") as directory:
        sockets = {name: Path(directory) / f"{name}.sock" for name in ("alice", "bob")}
        async with Switch() as switch:
            for name, path in sockets.items():
                await switch.add_port(name, f"vhost-user:{path}")
            async with (
                Guest(sockets["alice"], ip=f"{ALICE}/24", name="alice") as alice,
                Guest(sockets["bob"], ip=f"{BOB}/24", name="bob") as bob,
            ):
                first = await alice.ping(BOB, count=1, wait=FIRST_PING_PATIENCE)
                began = _process_age()
                stage = Stage(switch, quiet=json)
                stage.say("Two guests in this process, one switch, a vhost-user socket for each.")
                stage.say(f"First ping answered {began:.2f} s after this process started.")
                ping = await alice.ping(BOB, count=200, interval=0.001)
                stage.say(f"Ping alice to bob: {_ping_text(ping)}")
                alice.serve()
                bob.serve()
                streams = []
                for sender, remote, text in ((alice, BOB, "alice to bob"), (bob, ALICE, "bob to alice")):
                    async with stage.table():
                        stream = await sender.stream(remote, seconds=seconds)
                    streams.append(stream)
                    stage.say(f"TCP {text}: {_stream_text(stream)}")
                statistics = switch.stats()
    passed = first.received == 1 and ping.lost == 0 and all(stream.verified for stream in streams)
    if json:
        from .output import print_json

        print_json(
            Report(
                first_reply_after=began,
                ping={key: value for key, value in msgspec.to_builtins(ping).items() if key != "round_trips"},
                streams=[
                    {**msgspec.to_builtins(stream), "bits_per_second": stream.bits_per_second} for stream in streams
                ],
                statistics=statistics,
                passed=passed,
            )
        )
    else:
        frames = sum(port.frames("received") for port in statistics.ports)
        stage.say(f"The switch carried {count(frames)} frames. Each was copied once, from guest to guest.")
        stage.say(_NEXT)
    return passed


_NEXT = """
Try next:
  viaduct demo --qemu                                      the same with two Linux machines
  viaduct switch --port vm1=vhost-user:/tmp/vm1.sock --port vm2=vhost-user:/tmp/vm2.sock
                                                           a switch for machines of your own (docs/guide.md)
  viaduct guest ping --help                                a guest in this process on that switch"""


def _ping_text(ping: Ping) -> str:
    if ping.rtt is None:
        return f"none of {ping.sent} answered"
    times = f"median {ping.rtt.p50_us:.0f} µs, 99 % within {ping.rtt.p99_us:.0f} µs"
    return f"{ping.received} of {ping.sent} answered, {times}"


def _stream_text(stream: Stream) -> str:
    checked = "every byte checked" if stream.verified else f"CONTENT WRONG from byte {stream.first_mismatch}"
    return f"{stream.bits_per_second / 1e9:.2f} Gbit/s, {count(stream.sent)}B in {stream.seconds:.1f} s, {checked}"


def _process_age() -> float:
    """Seconds since this process started (field 22 of /proc/self/stat, proc(5))."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
