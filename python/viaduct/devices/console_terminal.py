"""The terminal end of a console: bytes out of the guest, bytes into it.

A console device (virtio or a serial port) has one `ConsoleTerminal`. The guest's side puts in what the guest has
written (`output`) and takes what is to be read there (`take_input`). The host's side may be many at once: a Python
program that waits for words (`expect`), a socket, a pseudo-terminal (`viaduct.devices.console_end`).

# How it works

What the guest wrote is kept in one scroll-back of bounded size, as a part of an endless stream. A reader is no more
than a position in that stream. So any number of readers cost nothing, and one that is slow loses what has left the
scroll-back (it is told how much) instead of holding up the guest or the others.

The other direction is a buffer of bounded size that belongs to the terminal; whoever writes into it looks at
`input_room` first, or is refused.

All of it happens on the thread of the asyncio loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable

SCROLL_BACK = 256 << 10
"""Bytes of the guest's output that are kept by default."""
INPUT_MAX = 64 << 10
"""Bytes that may wait for a guest that does not read."""
TAIL = 2000
"""Bytes of output that an error shows."""

_Waiter = asyncio.Future[None]


class ConsoleTerminal:
    """What a guest's console is connected to. `scroll_back`: bytes of output to keep."""

    def __init__(self, scroll_back: int = SCROLL_BACK, name: str = "console") -> None:
        if scroll_back < 1:
            raise ValueError(f"a scroll-back of {scroll_back} bytes: 1 or more")
        self.name = name
        """How errors call it."""
        self.on_input: Callable[[], None] = _nothing
        """The guest's side: called when there is input to take."""
        self.on_resize: Callable[[], None] = _nothing
        """The guest's side: called when `size` has changed."""
        self.size = (0, 0)
        """Columns and rows; zeroes if nobody knows."""
        self.closed = False
        """Nothing comes out of the guest any more."""
        self._limit = scroll_back
        self._kept = bytearray()
        self._end = 0
        self._input = bytearray()
        self._waiting: set[_Waiter] = set()
        self._awaiting_room: list[Callable[[], None]] = []
        self._expected = self.reader()

    # The guest's side.

    def output(self, data: bytes) -> None:
        """Takes what the guest has written. Never waits."""
        self._end += len(data)
        self._kept += data[-self._limit :]
        if (excess := len(self._kept) - self._limit) > 0:
            del self._kept[:excess]
        self._wake()

    def take_input(self, most: int) -> bytes:
        """Up to `most` bytes that are for the guest to read; empty if there are none."""
        data = bytes(self._input[:most])
        del self._input[: len(data)]
        if data and self._awaiting_room:
            calls, self._awaiting_room = self._awaiting_room, []
            for call in calls:
                call()
        return data

    def close(self) -> None:
        """The guest has gone: readers get what is left, and then the end."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    # The host's side.

    @property
    def start(self) -> int:
        """The position of the oldest byte that is kept."""
        return self._end - len(self._kept)

    @property
    def end(self) -> int:
        """The position behind the last byte: how many the guest has written."""
        return self._end

    @property
    def text(self) -> str:
        """What is kept of the guest's output."""
        return self._kept.decode(errors="replace")

    def kept(self, position: int, most: int | None = None) -> bytes:
        """The bytes from a position on, or from `start` if it is older, at most `most`."""
        first = max(position - self.start, 0)
        return bytes(self._kept[first : None if most is None else first + most])

    @property
    def input_waiting(self) -> int:
        """Bytes that the guest has not taken yet."""
        return len(self._input)

    @property
    def input_room(self) -> int:
        """How many bytes can be written now."""
        return max(INPUT_MAX - len(self._input), 0)

    def call_with_room(self, call: Callable[[], None]) -> None:
        """Calls `call` once when the guest has taken input, so that there is room for more."""
        if call not in self._awaiting_room:
            self._awaiting_room.append(call)

    def write(self, data: bytes | str) -> None:
        """Types `data` into the guest's console. Raises BufferError, and types nothing, if the guest has left so much
        unread that there is no room."""
        raw = data.encode() if isinstance(data, str) else data
        if len(raw) > self.input_room:
            raise BufferError(
                f"{self.name}: no room for {len(raw)} bytes: the guest has {len(self._input)} to read, and may have "
                f"{INPUT_MAX}"
            )
        self._input += raw
        if raw:
            self.on_input()

    def resize(self, columns: int, rows: int) -> None:
        """Changes the terminal's size; the guest is told if its console can be. Raises ValueError for a size that no
        terminal has."""
        if not (0 <= columns <= 0xFFFF and 0 <= rows <= 0xFFFF):
            raise ValueError(f"{self.name}: {columns} columns and {rows} rows: both 0 to 65535")
        if self.size != (columns, rows):
            self.size = (columns, rows)
            self.on_resize()

    def reader(self, position: int | None = None) -> ConsoleReader:
        """A reader of the guest's output, from `position` in the stream on; by default from the oldest byte kept."""
        return ConsoleReader(self, self.start if position is None else position)

    async def expect(self, what: str | bytes | re.Pattern[str], timeout: float | None = None) -> str:  # noqa: ASYNC109
        """Waits until the guest writes `what`: text as it is, or a regular expression. Looks at what came after the
        match before, or from the beginning. Returns that output up to the end of the match.

        `timeout` in seconds. Raises TimeoutError, and EOFError if the guest has gone; both say what came instead.
        """
        search = _Search(what)
        try:
            async with asyncio.timeout(timeout):
                while (size := search.look(self._expected)) is None:
                    if self.closed:
                        raise EOFError(f"{self.name}: the guest ended before it wrote {search}{self._tail()}")
                    await self.change()
        except TimeoutError:
            raise TimeoutError(f"{self.name}: no {search} within {timeout:g} s{self._tail()}") from None
        text = self._expected.peek()[:size].decode(errors="replace")
        self._expected.skip(size)
        return text

    async def change(self) -> None:
        """Waits until there is more output, or the end."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def _tail(self) -> str:
        tail = self._expected.peek()[-TAIL:].decode(errors="replace")
        return f"; it wrote since:\n{tail}" if tail.strip() else "; it wrote nothing since"


class ConsoleReader:
    """A position in a console's output. ``async for data in reader`` gives all that comes, and ends with the guest."""

    def __init__(self, terminal: ConsoleTerminal, position: int) -> None:
        self._terminal = terminal
        self.position = position
        """Bytes of the stream before the next one."""
        self.lost = 0
        """Bytes that left the scroll-back before they were read."""

    def peek(self) -> bytes:
        """What has come and was not read; it stays."""
        if (missed := self._terminal.start - self.position) > 0:
            self.lost += missed
            self.position += missed
        return self._terminal.kept(self.position)

    def skip(self, count: int) -> None:
        """Goes on behind the next `count` bytes, which have come."""
        self.position = min(self.position + count, self._terminal.end)

    async def read(self) -> bytes:
        """Waits for output and reads all there is; empty at the end."""
        while not (data := self.peek()) and not self._terminal.closed:
            await self._terminal.change()
        self.skip(len(data))
        return data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data


class _Search:
    """Looks for words in a reader's output, at what is new only if they are plain text."""

    def __init__(self, what: str | bytes | re.Pattern[str]) -> None:
        self._pattern = what if isinstance(what, re.Pattern) else None
        self._text = b"" if isinstance(what, re.Pattern) else what if isinstance(what, bytes) else what.encode()
        self._looked = 0
        """Up to here in the stream no match begins."""

    def __str__(self) -> str:
        return f"match of {self._pattern.pattern!r}" if self._pattern else repr(self._text.decode(errors="replace"))

    def look(self, reader: ConsoleReader) -> int | None:
        """How many bytes of what was not read end with the first match."""
        seen = reader.peek()
        if self._pattern is not None:
            text = seen.decode(errors="surrogateescape")
            match = self._pattern.search(text)
            return len(text[: match.end()].encode(errors="surrogateescape")) if match else None
        at = seen.find(self._text, max(self._looked - reader.position, 0))
        if at >= 0:
            return at + len(self._text)
        self._looked = reader.position + max(len(seen) - len(self._text) + 1, 0)
        return None


def _nothing() -> None:
    """Nobody is on the guest's side yet."""
