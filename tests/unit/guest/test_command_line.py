"""`viaduct guest`, `send` and `receive` as other programs call them."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

Sockets = tuple[Path, Path]


async def start(*words: object) -> asyncio.subprocess.Process:
    """Starts one command."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from viaduct.cli import main; main()",
        *map(str, words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def viaduct(*words: object) -> tuple[int, str, str]:
    """Runs one command; returns its exit code, output and errors."""
    process = await start(*words)
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def end(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Tells a command to end, which must end well; returns its JSON."""
    process.terminate()
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    decoded = json.loads(out)
    assert isinstance(decoded, dict)
    return decoded


async def result(*words: object) -> dict[str, Any]:
    """Runs one command that must succeed; returns its JSON."""
    code, out, err = await viaduct(*words, "--json")
    assert (code, err) == (0, "")
    decoded = json.loads(out)
    assert isinstance(decoded, dict)
    return decoded


async def test_ping_and_stream_to_a_server(sockets: Sockets) -> None:
    left, right = sockets
    server = await start("guest", "serve", "--connect", right, "--ring", "packed", "--json")
    ping = await result("guest", "ping", "10.0.0.2", "--connect", left, "--count", 3, "--timeout", 60)
    assert (ping["sent"], ping["received"], ping["lost"]) == (3, 3, 0)
    assert ping["link"]["ring"] == "split"
    options = ("--ring", "packed", "--no-mrg", "--no-event-idx", "--queue-size", 128, "--mtu", 1400)
    stream = await result("guest", "stream", "--connect", left, "--bytes", "1M", *options)
    assert (stream["sent"], stream["verified"], stream["link"]["ring"]) == (1 << 20, True, "packed")
    udp = await result("guest", "stream", "--connect", left, "--udp", "--bytes", "100k", "--rate", "1k")
    assert (udp["sent"], udp["received"], udp["corrupted"]) == (103, 103, 0)
    code, out, _ = await viaduct("guest", "ping", "--connect", left, "-c", 1, "--timeout", 10)
    assert (code, out.splitlines()[0]) == (0, "10.0.0.2: 1 sent, 1 received, 0 lost")
    served = await end(server)
    assert (served["streams_verified"], served["streams_mismatched"]) == (1, 0)


async def test_send_and_receive(sockets: Sockets) -> None:
    left, right = sockets
    sender = await start(
        "send", "--connect", left, "--seconds", 90, "--rate", "1k", "--size", 128, "--flows", 3, "--json"
    )
    received = await result("receive", "--connect", right, "--count", 500)
    sent = await end(sender)
    assert sent["size"] == 128
    assert sent["sent"] >= received["received"] >= 500
    assert (received["flows"], received["corrupted"], received["duplicated"]) == (3, 0, 0)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["guest", "ping"], 2, "either --connect PATH, or --listen PATH"),
        (["guest", "ping", "--connect", "/tmp/a", "--ring", "round"], 2, "must be split or packed"),
        (["guest", "stream", "--connect", "/tmp/a", "--direction", "up"], 2, "send, receive or echo"),
        (["guest", "stream", "--connect", "/tmp/a", "--bytes", "much"], 2, "as in 1000, 64k, 64M"),
        (["guest", "ping", "--connect", "/nowhere/a.sock", "--wait", "0.1"], 1, "nobody listens there"),
        (["send", "--connect", "/tmp/a", "--rate", "fast"], 2, "a number greater than 0, as in 5000, 64k"),
        (["send", "--connect", "/tmp/a", "--seconds", "1", "--count", "1"], 2, "either --seconds or --count"),
        (["send", "--connect", "/tmp/a", "--size", "20"], 1, "64 to 1514 bytes"),
        (["receive", "--connect", "/tmp/a", "--mac", "x"], 2, "is no MAC address"),
    ],
)
async def test_mistakes_are_answered(words: list[str], code: int, text: str) -> None:
    found, out, err = await viaduct(*words)
    assert (found, out) == (code, "")
    assert text in err
    assert "Traceback" not in err


async def test_nobody_answers(sockets: Sockets) -> None:
    code, _, err = await viaduct("guest", "ping", "10.0.0.9", "--connect", sockets[0], "-c", 1, "--timeout", 0.2)
    assert code == 1
    assert "10.0.0.9 does not answer" in err
