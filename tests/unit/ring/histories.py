"""What hypothesis draws: queues, and what their two sides do one after the other."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from .shared_memory import BUFFER_BYTES, BUFFERS, TABLE_BYTES, TABLES, Element, Queue


class Add(NamedTuple):
    """The driver adds a buffer with elements of these lengths."""

    out: list[int]
    writable: list[int]
    table: bool


class Kick(NamedTuple):
    """The driver makes what it added available."""


class Take(NamedTuple):
    """The driver takes up to so many used buffers."""

    most: int


class Pop(NamedTuple):
    """The device takes up to so many available buffers."""

    most: int


class Push(NamedTuple):
    """The device uses up to so many, picked by a seed where the order is free; IN_ORDER may use them as one."""

    most: int
    seed: int
    together: bool


class Publish(NamedTuple):
    """The device shows what it has used."""


class Listen(NamedTuple):
    """One side asks to be notified, or not to be."""

    driver: bool
    wanted: bool


class Restart(NamedTuple):
    """The side under test is started anew where it stands, if that is possible now."""


Step = Add | Kick | Take | Pop | Push | Publish | Listen | Restart

lengths = st.lists(st.sampled_from([0, 1, 2, 12, 60, BUFFER_BYTES]), max_size=3)
counts = st.integers(1, 20)
steps = st.lists(
    st.one_of(
        st.builds(Add, lengths, lengths, st.booleans()),
        st.builds(Add, st.just([60]), st.just([]), st.just(False)),
        st.builds(Kick),
        st.builds(Take, counts),
        st.builds(Pop, counts),
        st.builds(Push, counts, st.integers(0, 1000), st.booleans()),
        st.builds(Publish),
        st.builds(Listen, st.booleans(), st.booleans()),
        st.builds(Restart),
    ),
    min_size=20,
    max_size=120,
)


@st.composite
def queues(draw: st.DrawFn) -> Queue:
    """Either layout, small and odd sizes, from any place, with any of the three features."""
    features = st.booleans()
    if draw(st.booleans()):
        base = st.one_of(st.just(0), st.integers(65500, 65535), st.integers(0, 65535))
        size = draw(st.sampled_from([1, 2, 4, 8, 16, 64, 256]))
        return Queue("split", size, draw(base), draw(features), draw(features), draw(features))
    size = draw(st.one_of(st.integers(1, 20), st.sampled_from([64, 255])))
    half = draw(st.integers(0, size - 1)) | draw(st.booleans()) << 15
    return Queue("packed", size, half | half << 16, draw(features), draw(features), draw(features))


class Places:
    """Room for buffer elements and indirect tables, handed out in turn; none is reused while it is outstanding.

    There is far more of it than any queue here can hold.
    """

    def __init__(self) -> None:
        self.element = 0
        self.table = 0

    def elements(self, lengths: list[int]) -> list[Element]:
        elements = []
        for length in lengths:
            elements.append(Element(BUFFERS + self.element * BUFFER_BYTES, length))
            self.element = (self.element + 1) % ((TABLES - BUFFERS) // BUFFER_BYTES)
        return elements

    def next_table(self) -> int:
        self.table = (self.table + 1) % 1000
        return TABLES + self.table * TABLE_BYTES


class Sent(NamedTuple):
    """A buffer on its way."""

    out: list[Element]
    writable: list[Element]
    content: bytes
    slots: int

    @property
    def room(self) -> int:
        return sum(element.length for element in self.writable)


def content(token: int, length: int) -> bytes:
    """Bytes that tell one buffer from another."""
    return bytes((token * 7 + index) % 256 for index in range(length))


def answer(token: int, room: int) -> bytes:
    """What a device writes into a buffer: nothing, a part, or all of it."""
    return bytes((token * 13 + index) % 256 for index in range(room * (token % 3) // 2))
