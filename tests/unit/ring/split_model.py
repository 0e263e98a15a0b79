"""A split virtqueue, both sides, written down from virtio 1.2, section 2.7, as plainly as it can be.

Indexes count without end here and are cut to 16 bits where they are written, so that "has passed" is a comparison.
"""

from __future__ import annotations

import random
from collections import deque

from .shared_memory import Element, Queue, SharedMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1
WRAP = 1 << 16


def passes(event: int, old: int, new: int) -> bool:
    """Whether one of the entries `old` to `new - 1` is the one whose 16-bit index is `event` (2.7.7.2, 2.7.10.1)."""
    return any(index % WRAP == event for index in range(old, new))


class Ring:
    """Where the fields are (2.7.5, 2.7.6, 2.7.8)."""

    def __init__(self, memory: SharedMemory, queue: Queue) -> None:
        self.memory = memory
        self.queue = queue
        self.table, self.available, self.used = queue.addresses
        self.used_event = self.available + 4 + 2 * queue.size
        self.avail_event = self.used + 4 + 8 * queue.size

    def available_entry(self, index: int) -> int:
        return self.available + 4 + 2 * (index % self.queue.size)

    def used_entry(self, index: int) -> int:
        return self.used + 4 + 8 * (index % self.queue.size)

    def put_descriptor(self, table: int, index: int, element: Element, flags: int, following: int) -> None:
        at = table + 16 * index
        for offset, width, value in ((0, 8, element.addr), (8, 4, element.length), (12, 2, flags), (14, 2, following)):
            self.memory.put(at + offset, width, value)

    def get_descriptor(self, table: int, index: int) -> tuple[Element, int, int]:
        at = table + 16 * index
        element = Element(self.memory.get(at, 8), self.memory.get(at + 8, 4))
        return element, self.memory.get(at + 12, 2), self.memory.get(at + 14, 2)


class Driver(Ring):
    """2.7.13, 2.7.14"""

    def __init__(self, memory: SharedMemory, queue: Queue, chance: random.Random) -> None:
        super().__init__(memory, queue)
        self.chance = chance
        self.free = list(range(queue.size))
        self.outstanding: dict[int, tuple[int, list[int]]] = {}
        self.added = self.published = self.taken = queue.base
        for part in (self.available, self.used):
            memory.put(part, 2, 0)
            memory.put(part + 2, 2, queue.base)
        # Heads and chains are picked at random, but with IN_ORDER descriptors go round in turn (2.7.9).
        self.turn = 0

    def _pick(self) -> int:
        if self.queue.in_order:
            index = self.turn % self.queue.size
            self.turn += 1
            self.free.remove(index)
            return index
        return self.free.pop(self.chance.randrange(len(self.free)))

    def add(self, out: list[Element], writable: list[Element], token: int, table: int | None) -> bool:
        elements = [(element, 0) for element in out] + [(element, WRITE) for element in writable]
        if (1 if table is not None else len(elements)) > len(self.free):
            return False
        if table is not None:
            picks = [self._pick()]
            order = list(range(len(elements)))
            if not self.queue.in_order:
                tail = order[1:]
                self.chance.shuffle(tail)
                order[1:] = tail
            self._link(table, order, elements)
            self.put_descriptor(self.table, picks[0], Element(table, 16 * len(elements)), INDIRECT, 0)
        else:
            picks = [self._pick() for _ in elements]
            self._link(self.table, picks, elements)
        self.outstanding[picks[0]] = (token, picks)
        self.memory.put(self.available_entry(self.added), 2, picks[0])
        self.added += 1
        return True

    def _link(self, table: int, order: list[int], elements: list[tuple[Element, int]]) -> None:
        for place, (index, (element, write)) in enumerate(zip(order, elements, strict=True)):
            last = place + 1 == len(order)
            following = self.chance.randrange(WRAP) if last else order[place + 1]
            self.put_descriptor(table, index, element, write | (0 if last else NEXT), following)

    def publish(self) -> bool:
        """Whether to notify the device (2.7.10.1)."""
        old, self.published = self.published, self.added
        self.memory.put(self.available + 2, 2, self.added % WRAP)
        if self.queue.event_idx:
            return passes(self.memory.get(self.avail_event, 2), old, self.added)
        return self.added != old and self.memory.get(self.used, 2) == 0

    def take(self) -> tuple[int, int] | None:
        if self.memory.get(self.used + 2, 2) == self.taken % WRAP:
            return None
        at = self.used_entry(self.taken)
        head, written = self.memory.get(at, 4), self.memory.get(at + 4, 4)
        token, picks = self.outstanding.pop(head)
        self.free += picks
        self.taken += 1
        return token, written

    def listen(self, wanted: bool) -> None:
        """2.7.7"""
        if self.queue.event_idx:
            self.memory.put(self.used_event, 2, (self.taken if wanted else self.taken - 1) % WRAP)
        else:
            self.memory.put(self.available, 2, 0 if wanted else NO_INTERRUPT)

    def wants_call(self, used: int, more: int) -> bool:
        """Whether the device has to notify when the used index goes from `used` to `used + more` (2.7.7.2)."""
        if self.queue.event_idx:
            return passes(self.memory.get(self.used_event, 2), used, used + more)
        return more > 0 and self.memory.get(self.available, 2) == 0


class Device(Ring):
    """2.7.13, 2.7.14, from the other side."""

    def __init__(self, memory: SharedMemory, queue: Queue) -> None:
        super().__init__(memory, queue)
        self.taken = self.staged = self.published = queue.base
        self.slots: dict[int, int] = {}

    def pop(self) -> tuple[int, list[Element], list[Element]] | None:
        if self.memory.get(self.available + 2, 2) == self.taken % WRAP:
            return None
        head = self.memory.get(self.available_entry(self.taken), 2)
        self.taken += 1
        return head, *self._walk(self.table, head)

    def _walk(self, table: int, index: int) -> tuple[list[Element], list[Element]]:
        element, flags, following = self.get_descriptor(table, index)
        if flags & INDIRECT:
            assert table == self.table, "2.7.5.3.1: no table inside a table"
            assert not flags & NEXT, "2.7.5.3.1: INDIRECT and NEXT exclude each other"
            assert element.length % 16 == 0
            return self._walk(element.addr, 0)
        out, writable = self._walk(table, following) if flags & NEXT else ([], [])
        if flags & WRITE:
            assert not out, "2.7.4.2: readable elements first"
            return out, [element, *writable]
        return [element, *out], writable

    def push(self, batch: deque[tuple[int, int]]) -> None:
        """Uses buffers (head, written). Several at once: one element for all of them, for IN_ORDER (2.7.9)."""
        head, written = batch[-1]
        at = self.used_entry(self.staged)
        self.memory.put(at, 4, head)
        self.memory.put(at + 4, 4, written)
        self.staged += len(batch)

    def publish(self) -> bool:
        """Whether to notify the driver (2.7.7.2)."""
        old, self.published = self.published, self.staged
        self.memory.put(self.used + 2, 2, self.staged % WRAP)
        if self.queue.event_idx:
            return passes(self.memory.get(self.used_event, 2), old, self.staged)
        return self.staged != old and self.memory.get(self.available, 2) == 0

    def listen(self, wanted: bool) -> None:
        """2.7.10"""
        if self.queue.event_idx:
            self.memory.put(self.avail_event, 2, (self.taken if wanted else self.taken - 1) % WRAP)
        else:
            self.memory.put(self.used, 2, 0 if wanted else NO_NOTIFY)

    def wants_kick(self, available: int, more: int) -> bool:
        """Whether the driver has to notify when the available index goes from `available` to `available + more`."""
        if self.queue.event_idx:
            return passes(self.memory.get(self.avail_event, 2), available, available + more)
        return more > 0 and self.memory.get(self.used, 2) == 0
