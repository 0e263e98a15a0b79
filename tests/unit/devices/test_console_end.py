"""What a console can be connected to."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.slot import until
from viaduct.devices.console_end import ConsoleEnd, console_end
from viaduct.devices.console_terminal import INPUT_MAX, ConsoleTerminal
from viaduct.vhost_user import SocketPathError


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="con") as name:
        yield Path(name)


async def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        part = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 4096), 30)
        assert part, data
        data += part
    return data


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.setblocking(False)
    return sock


async def test_a_socket_with_two_at_once(directory: Path) -> None:
    terminal = ConsoleTerminal()
    terminal.output(b"before ")
    end = console_end(f"socket:{directory / 's'}", terminal)
    await end.start()
    first, second = connect(directory / "s"), connect(directory / "s")
    assert await read_until(first, b"before ") == await read_until(second, b"before ")
    first.send(b"ls\n")
    await until(lambda: terminal.input_waiting == 3)
    assert terminal.take_input(10) == b"ls\n"
    first.close()
    for _ in range(3):
        terminal.output(b"after")
        assert await read_until(second, b"after") == b"after"
    second.shutdown(socket.SHUT_WR)  # Types no more, and goes on looking.
    await asyncio.sleep(0.01)
    terminal.output(b"the end")
    terminal.close()
    assert await read_until(second, b"the end") == b"the end"
    assert await asyncio.get_running_loop().sock_recv(second, 10) == b""
    second.close()
    await end.close()
    await end.close()
    assert not (directory / "s").exists()


async def test_who_does_not_read_holds_up_nobody(directory: Path) -> None:
    terminal = ConsoleTerminal(scroll_back=1 << 16)
    end = console_end(f"socket:{directory / 's'}", terminal)
    await end.start()
    idle, busy = connect(directory / "s"), connect(directory / "s")
    total = 0
    for number in range(400):
        terminal.output(b"%08d" % number * 1000)
        total += len(await read_until(busy, b"%08d" % number))
        while total < (number + 1) * 8000:
            total += len(await read_until(busy, b"%08d" % number))
    assert total == 400 * 8000
    idle.close()
    busy.close()
    await end.close()


async def test_who_types_more_than_the_guest_reads_waits(directory: Path) -> None:
    terminal = ConsoleTerminal()
    end = console_end(f"socket:{directory / 's'}", terminal)
    await end.start()
    sock = connect(directory / "s")
    text = os.urandom(3 * INPUT_MAX)
    sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(sock, text))
    await until(lambda: terminal.input_waiting == INPUT_MAX)
    got = b""
    while len(got) < len(text):
        got += terminal.take_input(1000)
        await asyncio.sleep(0)
    assert got == text
    await sending
    sock.close()
    await end.close()


async def test_a_path_that_is_taken(directory: Path) -> None:
    first = console_end(f"socket:{directory / 's'}", ConsoleTerminal())
    await first.start()
    with pytest.raises(SocketPathError, match="in use"):
        await console_end(f"socket:{directory / 's'}", ConsoleTerminal()).start()
    await first.close()


async def test_a_file(directory: Path) -> None:
    (directory / "log").write_bytes(b"yesterday\n")
    terminal = ConsoleTerminal()
    end = console_end(f"file:{directory / 'log'}", terminal)
    await end.start()
    terminal.output(b"today\n")
    await until(lambda: (directory / "log").read_bytes() == b"yesterday\ntoday\n")
    await end.close()


async def test_a_pseudo_terminal() -> None:
    terminal = ConsoleTerminal()
    end = console_end("pty", terminal)
    await end.start()
    for _ in range(2):  # One program after the other.
        fd = os.open(end.where, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        terminal.output(b"login: ")
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(fd, readable.set)
        await asyncio.wait_for(readable.wait(), 30)
        loop.remove_reader(fd)
        assert os.read(fd, 100).endswith(b"login: ")
        os.write(fd, b"root\r")
        await until(lambda: terminal.input_waiting == 5)
        assert terminal.take_input(10) == b"root\r"
        os.close(fd)
    await end.close()


PROGRAM = """
import asyncio, sys
from viaduct.devices.console_end import console_end
from viaduct.devices.console_terminal import ConsoleTerminal

async def main():
    terminal = ConsoleTerminal()
    left = asyncio.Event()
    end = console_end("stdio", terminal, left.set)
    await end.start()
    terminal.output(b"ready\\r\\n")
    typed = b""
    while b"quit" not in typed and not left.is_set():
        await asyncio.sleep(0.005)
        typed += terminal.take_input(100)
    terminal.output(b"typed " + typed)
    terminal.close()
    await end.close()

asyncio.run(main())
"""


def test_standard_input_and_output_as_pipes_and_files(directory: Path) -> None:
    (directory / "in").write_bytes(b"from a file quit")
    for stdin in (subprocess.PIPE, None):
        if stdin is None:
            with (directory / "in").open("rb") as source, (directory / "out").open("wb") as target:
                target.write(b"before\n")
                target.flush()
                subprocess.run([sys.executable, "-c", PROGRAM], stdin=source, stdout=target, check=True, timeout=60)
            assert (directory / "out").read_bytes() == b"before\nready\r\ntyped from a file quit"
        else:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM], input=b"by a pipe quit", capture_output=True, check=True, timeout=60
            )
            assert done.stdout == b"ready\r\ntyped by a pipe quit"


def test_a_terminal_is_raw_and_put_back() -> None:
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=theirs, stdout=theirs, start_new_session=True) as run:
        seen = b""
        while b"ready" not in seen:
            seen += os.read(ours, 100)
        assert not termios.tcgetattr(theirs)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
        os.write(ours, b"\x03ab\x1dnot this")
        while b"typed" not in seen or not seen.endswith(b"ab"):
            seen += os.read(ours, 100)
        assert run.wait(60) == 0
    assert seen == b"ready\r\ntyped \x03ab"
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("kind", ["", "socket", "socket:", "file:", "stdio:x", "tcp:1", "pty:", "none:"])
def test_kinds_that_do_not_exist(kind: str) -> None:
    with pytest.raises(ValueError, match="stdio, socket:PATH, file:PATH, pty or none is expected"):
        console_end(kind, ConsoleTerminal())


async def test_nowhere() -> None:
    end = console_end("none", ConsoleTerminal())
    assert type(end) is ConsoleEnd
    await end.start()
    await end.close()
