"""The terminal end of a console."""

from __future__ import annotations

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viaduct.devices.console_terminal import INPUT_MAX, ConsoleTerminal

SOON = 30.0


async def test_words_that_are_there_already() -> None:
    console = ConsoleTerminal()
    console.output(b"Debian GNU/Linux\nhost login: ")
    assert await console.expect("login:", SOON) == "Debian GNU/Linux\nhost login:"
    console.output(b"root\nPassword: ")
    assert await console.expect(b"Password:", SOON) == " root\nPassword:"


async def test_words_that_come_later_and_in_pieces() -> None:
    console = ConsoleTerminal()
    waiting = asyncio.create_task(console.expect("login:", SOON))
    for byte in b"some logi\x00n login: ":
        console.output(bytes([byte]))
        await asyncio.sleep(0)
    assert await waiting == "some logi\x00n login:"


async def test_a_word_twice_is_found_twice() -> None:
    console = ConsoleTerminal()
    console.output(b"$ ls\n$ ")
    assert await console.expect("$ ", SOON) == "$ "
    assert await console.expect("$ ", SOON) == "ls\n$ "


async def test_a_pattern() -> None:
    console = ConsoleTerminal()
    console.output("Größe \xff".encode("latin-1") + "é 42 kB".encode())
    assert (await console.expect(re.compile(r"(\d+) kB"), SOON)).endswith("42 kB")
    console.output(b"next")
    assert await console.expect("next", SOON) == "next"


async def test_what_never_comes() -> None:
    console = ConsoleTerminal(name="vm1's console")
    console.output(b"Kernel panic - not syncing")
    with pytest.raises(TimeoutError, match=r"vm1's console: no 'login:' within 0\.01 s; it wrote since:\nKernel panic"):
        await console.expect("login:", 0.01)
    assert await console.expect("panic", SOON) == "Kernel panic"


async def test_a_guest_that_ends() -> None:
    console = ConsoleTerminal()
    waiting = asyncio.create_task(console.expect("login:"))
    await asyncio.sleep(0)
    console.output(b"Power down.")
    console.close()
    with pytest.raises(EOFError, match=r"before it wrote 'login:'; it wrote since:\nPower down\."):
        await waiting
    assert await console.expect("down", SOON) == "Power down"


async def test_several_readers_and_a_slow_one() -> None:
    console = ConsoleTerminal(scroll_back=1000)
    slow, quick = console.reader(), console.reader()
    seen = b""
    for number in range(100):
        console.output(b"line %04d........................\n" % number)
        seen += await quick.read()
    assert seen == b"".join(b"line %04d........................\n" % number for number in range(100))
    assert quick.lost == 0
    late = await slow.read()
    assert late == seen[-1000:]
    assert slow.lost == len(seen) - 1000
    assert console.text.encode() == late


async def test_the_end_of_a_reader() -> None:
    console = ConsoleTerminal()
    console.output(b"one")
    console.close()
    assert [data async for data in console.reader()] == [b"one"]


async def test_input_is_bounded() -> None:
    console = ConsoleTerminal()
    told = []
    console.on_input = lambda: told.append(console.input_waiting)
    console.write("ls\n")
    console.write(bytes(INPUT_MAX - 3))
    with pytest.raises(BufferError, match="no room for 1 bytes"):
        console.write(b"x")
    assert told == [3, INPUT_MAX]
    room: list[int] = []
    console.call_with_room(lambda: room.append(console.input_room))
    assert console.take_input(2) == b"ls"
    assert console.take_input(1) == b"\n"
    assert room == [2]
    assert console.input_room == 3


async def test_sizes() -> None:
    console = ConsoleTerminal()
    sizes = []
    console.on_resize = lambda: sizes.append(console.size)
    console.resize(80, 25)
    console.resize(80, 25)
    console.resize(132, 43)
    assert sizes == [(80, 25), (132, 43)]
    with pytest.raises(ValueError, match="0 to 65535"):
        console.resize(65536, 1)


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 64))
def test_the_scroll_back_is_the_end_of_all_that_came(parts: list[bytes], limit: int) -> None:
    async def run() -> None:
        console = ConsoleTerminal(scroll_back=limit)
        for part in parts:
            console.output(part)
        everything = b"".join(parts)
        assert console.kept(0) == everything[-limit:]
        assert console.end == len(everything)
        assert console.start == max(len(everything) - limit, 0)

    asyncio.run(run())
