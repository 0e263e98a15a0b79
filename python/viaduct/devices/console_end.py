"""What a console can be connected to on the host: ``stdio``, ``socket:PATH``, ``file:PATH``, ``pty``, ``none``.

Each end reads the terminal's output at its own pace (`ConsoleTerminal.reader`) and types what comes from outside
while the terminal has room for it. Nothing here ever blocks the loop: descriptors are made non-blocking, or are
regular files.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import select
import socket
import stat
import struct
import termios
import tty
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from types import TracebackType
from typing import Self

from viaduct.devices.console_terminal import ConsoleReader, ConsoleTerminal
from viaduct.vhost_user.socket_path import Listener

log = logging.getLogger("viaduct.devices")

KINDS = "stdio, socket:PATH, file:PATH, pty or none"
ESCAPE = b"\x1d"
"""Ctrl-]: leaves the console where it has the user's own terminal."""


class ConsoleEnd:
    """Connects a terminal to the outside. Base of the kinds below; alone it is ``none``: connected to nothing."""

    def __init__(self, terminal: ConsoleTerminal) -> None:
        self.terminal = terminal

    @property
    def where(self) -> str:
        """Where a person finds it, once it has started."""
        return "nowhere"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Begins. Raises OSError or `viaduct.vhost_user.SocketPathError` if that is not possible."""

    async def close(self) -> None:
        """Ends, and gives everything back. What is not taken at once is not waited for. May be called twice."""


def console_end(kind: str, terminal: ConsoleTerminal, leave: Callable[[], None] | None = None) -> ConsoleEnd:
    """The end that `kind` names, not started yet. `leave`: called when a person at stdio wants to leave (Ctrl-]).

    Raises ValueError for a kind that does not exist.
    """
    name, colon, path = kind.partition(":")
    match name:
        case "none" if not colon:
            return ConsoleEnd(terminal)
        case "stdio" if not colon:
            return StdioEnd(terminal, leave)
        case "pty" if not colon:
            return PtyEnd(terminal)
        case "socket" if path:
            return SocketEnd(terminal, Path(path))
        case "file" if path:
            return FileEnd(terminal, Path(path))
    raise ValueError(f"console {kind!r}: {KINDS} is expected")


class _Stream:
    """A descriptor to read from and one to write to, both non-blocking or of regular files, and a terminal between."""

    def __init__(
        self,
        terminal: ConsoleTerminal,
        read_fd: int | None,
        write_fd: int | None,
        ended: Callable[[], None],
        typed: Callable[[bytes], bytes] = lambda data: data,
    ) -> None:
        """`ended`: called when nothing more can be read or written. `typed`: sees what is typed and says what of it is
        for the guest."""
        self._terminal, self._read_fd, self._write_fd = terminal, read_fd, write_fd
        self._ended, self._typed = ended, typed
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._reader = terminal.reader()
        self._writing = asyncio.create_task(self._write(self._reader)) if write_fd is not None else None
        self._listen()

    def _listen(self) -> None:
        if self._read_fd is None or not self._open:
            return
        try:
            self._loop.add_reader(self._read_fd, self._readable)
        except PermissionError:  # A regular file, or /dev/null: always readable, and nothing that epoll knows.
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        if not self._open or self._read_fd is None:
            return
        room = self._terminal.input_room
        if not room:
            self._deafen()
            self._terminal.call_with_room(self._listen)
            return
        try:
            data = os.read(self._read_fd, room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._deafen()
            if self._write_fd is None or _hung_up(self._read_fd):
                self._ended()
            self._read_fd = None  # Who only types no more may still want to see.
            return
        self._terminal.write(self._typed(data))
        if stat.S_ISREG(os.fstat(self._read_fd).st_mode):
            self._loop.call_soon(self._readable)

    def _deafen(self) -> None:
        if self._read_fd is not None:
            with contextlib.suppress(PermissionError):
                self._loop.remove_reader(self._read_fd)

    async def _write(self, reader: ConsoleReader) -> None:
        assert self._write_fd is not None
        try:
            while not (self._terminal.closed and not reader.peek()):
                if not (data := reader.peek()):
                    await self._terminal.change()
                    continue
                try:
                    reader.skip(os.write(self._write_fd, data))
                except (BlockingIOError, InterruptedError):
                    await self._writable()
        except OSError:
            pass  # Whoever looked has left.
        self._ended()

    async def _writable(self) -> None:
        assert self._write_fd is not None
        free = asyncio.Event()
        self._loop.add_writer(self._write_fd, free.set)
        try:
            await free.wait()
        finally:
            self._loop.remove_writer(self._write_fd)

    async def close(self) -> None:
        """Lets go of the descriptors, which are the caller's to close."""
        if not self._open:
            return
        self._open = False
        self._deafen()
        if self._writing is not None and self._write_fd is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
            with contextlib.suppress(OSError):
                self._reader.skip(os.write(self._write_fd, self._reader.peek()))


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


class StdioEnd(ConsoleEnd):
    """This process's standard input and output. A terminal is put into raw mode, so that the guest's own line editing
    and its control characters work, and put back at the end."""

    def __init__(self, terminal: ConsoleTerminal, leave: Callable[[], None] | None = None) -> None:
        super().__init__(terminal)
        self._leave = leave
        self._stream: _Stream | None = None
        self._before: list[object] | None = None
        self._own: list[int] = []
        self._made_unblocking: list[int] = []

    @property
    def where(self) -> str:
        return "standard input and output"

    async def start(self) -> None:
        if os.isatty(0):
            self._before = termios.tcgetattr(0)
            tty.setraw(0)
            with contextlib.suppress(OSError):
                rows, columns = struct.unpack("HHHH", ioctl(0, termios.TIOCGWINSZ, bytes(8)))[:2]
                self.terminal.resize(columns, rows)
        self._stream = _Stream(
            self.terminal, self._unblocked(0), self._unblocked(1), ended=lambda: None, typed=self._typed
        )

    def _unblocked(self, fd: int) -> int:
        """A descriptor of the same thing that never blocks. The flags of the one that a shell shares with us are left
        alone, unless it is a socket or somebody else's: those cannot be opened anew."""
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            return fd
        try:
            own = os.open(f"/proc/self/fd/{fd}", (os.O_WRONLY if fd else os.O_RDONLY) | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            own = os.dup(fd)
            os.set_blocking(own, False)
            self._made_unblocking.append(fd)
        self._own.append(own)
        return own

    def _typed(self, data: bytes) -> bytes:
        if self._before is not None and self._leave is not None and ESCAPE in data:
            self._leave()
            return data[: data.index(ESCAPE)]
        return data

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.close()
            self._stream = None
        while self._own:
            os.close(self._own.pop())
        while self._made_unblocking:
            os.set_blocking(self._made_unblocking.pop(), True)
        if self._before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]
            self._before = None


class FileEnd(ConsoleEnd):
    """Everything that the guest writes is appended to a file."""

    def __init__(self, terminal: ConsoleTerminal, path: Path) -> None:
        super().__init__(terminal)
        self.path = path
        self._fd: int | None = None
        self._stream: _Stream | None = None

    @property
    def where(self) -> str:
        return str(self.path)

    async def start(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        self._stream = _Stream(self.terminal, None, self._fd, ended=lambda: None)

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.close()
            self._stream = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class PtyEnd(ConsoleEnd):
    """A new pseudo-terminal: `where` is what a program opens (``screen /dev/pts/7``)."""

    def __init__(self, terminal: ConsoleTerminal) -> None:
        super().__init__(terminal)
        self._fds: tuple[int, int] | None = None
        self._stream: _Stream | None = None
        self._name = "not started"

    @property
    def where(self) -> str:
        return self._name

    async def start(self) -> None:
        # The programs' side stays open here too: else its last one to leave would end our reading.
        self._fds = ours, theirs = os.openpty()
        tty.setraw(theirs)
        os.set_blocking(ours, False)
        self._name = os.ttyname(theirs)
        self._stream = _Stream(self.terminal, ours, ours, ended=lambda: None)

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.close()
            self._stream = None
        if self._fds is not None:
            for fd in self._fds:
                os.close(fd)
            self._fds = None


class SocketEnd(ConsoleEnd):
    """A UNIX socket: whoever connects sees what is in the scroll-back and then what comes, and can type. Several can be
    connected at once."""

    def __init__(self, terminal: ConsoleTerminal, path: Path) -> None:
        super().__init__(terminal)
        self.path = path
        self._listener: Listener | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._clients: dict[socket.socket, _Stream] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def where(self) -> str:
        return str(self.path)

    async def start(self) -> None:
        self._listener = Listener(str(self.path))
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                client = await listener.accept()
            except OSError as error:  # No descriptor left, for example.
                log.error("%s: cannot accept a connection: %s", self.terminal.name, error)
                await asyncio.sleep(1)
                continue
            client.setblocking(False)
            fd = client.fileno()
            self._clients[client] = _Stream(self.terminal, fd, fd, ended=functools.partial(self._left, client))

    def _left(self, client: socket.socket) -> None:
        task = asyncio.create_task(self._drop(client))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _drop(self, client: socket.socket) -> None:
        if (stream := self._clients.pop(client, None)) is not None:
            await stream.close()
            client.close()

    async def close(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None
        for client in list(self._clients):
            await self._drop(client)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
