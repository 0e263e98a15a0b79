"""The command line with programs nobody here wrote: Linux machines of QEMU, and Wireshark's reader of captures."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from interop.peer_process import require
from interop.viaduct_switch import ViaductSwitch
from viaduct.guest import Guest

VIADUCT = str(Path(sys.executable).parent / "viaduct")


def test_demonstration_with_two_linux_machines(directory: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(directory)}
    done = subprocess.run(
        [VIADUCT, "demo", "--qemu", "--seconds", "1", "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["ping_received"] == report["ping_sent"] == 20
    assert report["fetched_bytes"] >= 64 << 20
    assert list(directory.iterdir()) == []


def test_a_live_capture_is_what_tshark_reads(directory: Path) -> None:
    """Frames reach a reader at the other end of a pipe while the capture goes on, with port and direction."""
    switch = ViaductSwitch(directory, others=[f"vm{n}=vhost-user:{directory}/vm{n}.sock" for n in (1, 2)])
    switch.start()
    try:
        capture = subprocess.Popen(
            [VIADUCT, "capture", "vm1", "-w", "-", "--control", str(switch.control)], stdout=subprocess.PIPE
        )
        fields = ("frame.interface_name", "frame.packet_flags_direction", "ip.src", "icmp.type")
        words = [require("tshark", "tshark"), "-l", "-r", "-", "-Y", "icmp", "-T", "fields"]
        reader = subprocess.Popen(
            [*words, *(word for field in fields for word in ("-e", field))],
            stdin=capture.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert reader.stdout is not None
        with capture, reader, reader.stdout:
            asyncio.run(_ping_until_shown(directory, reader.stdout.fileno()))
            rows = [reader.stdout.readline().split("\t") for _ in range(2)]
            capture.terminate()
            reader.terminate()
    finally:
        switch.stop()
    shown = {(name, int(direction, 0), source, kind.strip()) for name, direction, source, kind in rows}
    assert shown == {("vm1", 1, "10.0.0.1", "8"), ("vm1", 2, "10.0.0.2", "0")}


async def _ping_until_shown(directory: Path, output: int) -> None:
    """Ping from one guest to another until the reader has shown something."""
    loop = asyncio.get_running_loop()
    shown = asyncio.Event()
    loop.add_reader(output, shown.set)
    async with (
        Guest(directory / "vm1.sock", ip="10.0.0.1/24") as one,
        Guest(directory / "vm2.sock", ip="10.0.0.2/24"),
    ):
        while not shown.is_set():
            result = await one.ping("10.0.0.2", count=1)
            assert result.received == 1
    loop.remove_reader(output)
