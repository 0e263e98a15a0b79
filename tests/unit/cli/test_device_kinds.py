"""`viaduct device rng|console|vsock|balloon` as processes: they serve, say where, and end by a signal."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.running import PATIENCE, PROGRAM, viaduct, wait_until
from viaduct.vhost_user import FrontEnd
from viaduct.virtio import DeviceFeature, DeviceType


@contextmanager
def device(directory: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A device on `directory`/s with its output in `directory`/log; ends with status 0."""
    with (directory / "log").open("wb") as log:
        command = [PROGRAM, "device", *words, "--socket", str(directory / "s")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: (directory / "s").exists() or process.poll() is not None, "it listens")
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, (directory / "log").read_text()
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    assert not (directory / "s").exists()


def front_end(directory: Path, kind: DeviceType, queues: int) -> FrontEnd:
    return FrontEnd(
        str(directory / "s"),
        device_id=kind,
        features=DeviceFeature.VERSION_1,
        queue_count=queues,
        queue_size=16,
        memory_size=1 << 20,
    )


@pytest.mark.parametrize(
    ("words", "kind", "queues", "config"),
    [
        (["rng", "--rate", "1000"], DeviceType.ENTROPY, 1, b""),
        (["console", "--console", "none"], DeviceType.CONSOLE, 2, b"\0\0\0\0\1\0\0\0"),
        (["balloon", "--size", "1M"], DeviceType.BALLOON, 4, b"\0\1\0\0\0\0\0\0"),
    ],
)
async def test_it_serves(tmp_path: Path, words: list[str], kind: DeviceType, queues: int, config: bytes) -> None:
    with device(tmp_path, *words):
        for _ in range(2):
            async with front_end(tmp_path, kind, queues) as fe:
                if config:
                    assert await fe.read_config(0, len(config)) == config


async def test_sockets(tmp_path: Path) -> None:
    with device(tmp_path, "vsock", "--path", str(tmp_path / "v"), "--cid", "9"):
        async with front_end(tmp_path, DeviceType.VSOCK, 3) as fe:
            assert await fe.read_config(0, 8) == (9).to_bytes(8, "little")
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(str(tmp_path / "v"))
                sock.sendall(b"nonsense\n")
                assert sock.recv(5) == b"ERROR"
    assert not (tmp_path / "v").exists()


def test_a_console_says_where_it_is(tmp_path: Path) -> None:
    with device(tmp_path, "console", "--console", "pty", "--port", f"agent=socket:{tmp_path / 'a'}"):
        text = (tmp_path / "log").read_text()
        assert "Console: at /dev/pts/" in text
        assert f"Console: at {tmp_path / 'a'}" in text
        assert (tmp_path / "a").exists()
    assert not (tmp_path / "a").exists()


def test_a_balloon_takes_sizes(tmp_path: Path) -> None:
    with device(tmp_path, "balloon") as process:
        assert process.stdin is not None
        process.stdin.write(b"64M\nlots\n")
        process.stdin.flush()
        wait_until(lambda: "'lots' is no size" in (tmp_path / "log").read_text(), "the second line was read")
        assert "is to have 67108864" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["console", "--console", "tcp:1"], "stdio, socket:PATH, file:PATH, pty or none is expected"),
        (["console", "--port", "agent"], "NAME=KIND is expected"),
        (["console", "--port", "a=stdio"], "two ports want standard input and output"),
        (["vsock", "--path", "v", "--cid", "2"], "3 to 4294967294"),
        (["balloon", "--size", "much"], "is no size"),
    ],
)
def test_what_cannot_be(tmp_path: Path, words: list[str], message: str) -> None:
    done = viaduct("device", *words, "--socket", str(tmp_path / "s"))
    assert done.returncode == 2
    assert message in done.stderr
