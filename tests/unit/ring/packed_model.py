"""A packed virtqueue, both sides, written down from virtio 1.2, section 2.8, as plainly as it can be.

Places in the ring count without end here: the index is the remainder by the size; the wrap counter is 1 in even laps.
"""

from __future__ import annotations

import random
from collections import deque

from .shared_memory import Element, Queue, SharedMemory

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2


class Ring:
    """Where the fields are (2.8.13, 2.8.14), and what a place is."""

    def __init__(self, memory: SharedMemory, queue: Queue) -> None:
        self.memory = memory
        self.queue = queue
        self.ring, self.driver_event, self.device_event = queue.addresses

    def place(self, half: int) -> int:
        """From one half of a base: index in bits 0 to 14, wrap counter in bit 15."""
        return (half & 0x7FFF) + (0 if half >> 15 else self.queue.size)

    def wrap(self, place: int) -> bool:
        return place // self.queue.size % 2 == 0

    def encoded(self, place: int) -> int:
        return place % self.queue.size | self.wrap(place) << 15

    def available_marks(self, place: int) -> int:
        return AVAIL if self.wrap(place) else USED

    def used_marks(self, place: int) -> int:
        return AVAIL | USED if self.wrap(place) else 0

    def put_descriptor(self, at: int, element: Element, identity: int, flags: int) -> None:
        for offset, width, value in ((0, 8, element.addr), (8, 4, element.length), (12, 2, identity), (14, 2, flags)):
            self.memory.put(at + offset, width, value)

    def get_descriptor(self, at: int) -> tuple[Element, int, int]:
        element = Element(self.memory.get(at, 8), self.memory.get(at + 8, 4))
        return element, self.memory.get(at + 12, 2), self.memory.get(at + 14, 2)

    def descriptor(self, place: int) -> int:
        return self.ring + 16 * (place % self.queue.size)

    def ask(self, event: int, wanted: bool, place: int) -> None:
        """Writes an event suppression structure (2.8.14)."""
        if wanted and self.queue.event_idx:
            self.memory.put(event, 2, self.encoded(place))
            self.memory.put(event + 2, 2, DESC)
        else:
            self.memory.put(event + 2, 2, ENABLE if wanted else DISABLE)

    def wants(self, event: int, old: int, more: int) -> bool:
        """Whether the side that wrote `event` wants to hear of the `more` descriptors from `old` on (2.8.10)."""
        flags = self.memory.get(event + 2, 2)
        if flags == DESC:
            return any(self.encoded(place) == self.memory.get(event, 2) for place in range(old, old + more))
        return more > 0 and flags == ENABLE


class Driver(Ring):
    """2.8.21, 2.8.22"""

    def __init__(self, memory: SharedMemory, queue: Queue, chance: random.Random) -> None:
        super().__init__(memory, queue)
        self.chance = chance
        self.ids = list(range(queue.size))
        self.room = queue.size
        self.outstanding: dict[int, tuple[int, int]] = {}
        self.added = self.published = self.taken = self.place(queue.base & 0xFFFF)
        self.held_back: tuple[int, int] | None = None
        for place in range(self.added, self.added + queue.size):
            # Zero, or what a full lap before this one has left.
            marks = self.used_marks(place - queue.size)
            self.put_descriptor(self.descriptor(place), Element(0, 0), 0, marks)
        memory.put(self.driver_event, 4, 0)
        memory.put(self.device_event, 4, 0)

    def add(self, out: list[Element], writable: list[Element], token: int, table: int | None) -> bool:
        elements = [(element, 0) for element in out] + [(element, WRITE) for element in writable]
        if table is not None:
            for index, (element, write) in enumerate(elements):
                # Anything may stand in the reserved id (2.8.7).
                self.put_descriptor(table + 16 * index, element, self.chance.randrange(1 << 16), write)
            elements = [(Element(table, 16 * len(elements)), INDIRECT)]
        if len(elements) > self.room:
            return False
        identity = self.ids.pop(self.chance.randrange(len(self.ids)))
        for index, (element, flags) in enumerate(elements):
            last = index + 1 == len(elements)
            flags |= self.available_marks(self.added) | (0 if last else NEXT)
            at = self.descriptor(self.added)
            # The id stands in the last descriptor of a list (2.8.6).
            self.put_descriptor(at, element, identity if last else self.chance.randrange(1 << 16), 0)
            if self.held_back is None:
                self.held_back = (at, flags)
                self.memory.put(at + 14, 2, self.used_marks(self.added - self.queue.size))
            else:
                self.memory.put(at + 14, 2, flags)
            self.added += 1
        self.room -= len(elements)
        self.outstanding[identity] = (token, len(elements))
        return True

    def publish(self) -> bool:
        """Whether to notify the device (2.8.21.2)."""
        if self.held_back is not None:
            at, flags = self.held_back
            self.memory.put(at + 14, 2, flags)
            self.held_back = None
        old, self.published = self.published, self.added
        return self.wants(self.device_event, old, self.added - old)

    def take(self) -> tuple[int, int] | None:
        element, identity, flags = self.get_descriptor(self.descriptor(self.taken))
        if flags & (AVAIL | USED) != self.used_marks(self.taken) or self.taken == self.published:
            return None
        token, slots = self.outstanding.pop(identity)
        self.ids.append(identity)
        self.room += slots
        self.taken += slots
        return token, element.length if flags & WRITE else 0

    def listen(self, wanted: bool) -> None:
        self.ask(self.driver_event, wanted, self.taken)

    def wants_call(self, used: int, more: int) -> bool:
        """Whether the device has to notify when it has used the `more` descriptors from `used` on."""
        return self.wants(self.driver_event, used, more)


class Device(Ring):
    """2.8.21, 2.8.22, from the other side."""

    def __init__(self, memory: SharedMemory, queue: Queue) -> None:
        super().__init__(memory, queue)
        self.taken = self.place(queue.base & 0xFFFF)
        self.staged = self.published = self.place(queue.base >> 16)
        self.slots: dict[int, int] = {}
        self.unwritten: list[tuple[int, int, int, int]] = []

    def pop(self) -> tuple[int, list[Element], list[Element]] | None:
        out: list[Element] = []
        writable: list[Element] = []
        first = self.taken
        while True:
            element, identity, flags = self.get_descriptor(self.descriptor(self.taken))
            if flags & (AVAIL | USED) != self.available_marks(self.taken):
                assert self.taken == first, "2.8.6: a list is available as a whole"
                return None
            self.taken += 1
            if flags & INDIRECT:
                assert self.taken == first + 1, "2.8.19: no table in a list"
                assert not flags & NEXT, "2.8.19: no table in a list"
                assert element.length % 16 == 0
                for at in range(element.addr, element.addr + element.length, 16):
                    inner, _, inner_flags = self.get_descriptor(at)
                    assert inner_flags & ~WRITE == 0, "2.8.19: no other flag in a table"
                    (writable if inner_flags & WRITE else out).append(inner)
                    assert not writable or inner_flags & WRITE, "2.8.17: readable elements first"
            else:
                (writable if flags & WRITE else out).append(element)
                assert not writable or flags & WRITE, "2.8.17: readable elements first"
            if not flags & NEXT:
                self.slots[identity] = self.taken - first
                return identity, out, writable

    def push(self, batch: deque[tuple[int, int]]) -> None:
        """Uses buffers (id, written). Several at once: one descriptor for all of them, for IN_ORDER (2.8.8)."""
        identity, written = batch[-1]
        marks = self.used_marks(self.staged) | (WRITE if written else 0)
        self.unwritten.append((self.descriptor(self.staged), identity, written, marks))
        self.staged += sum(self.slots.pop(used) for used, _ in batch)

    def publish(self) -> bool:
        """Whether to notify the driver (2.8.10)."""
        for at, identity, written, marks in reversed(self.unwritten):
            self.memory.put(at + 8, 4, written)
            self.memory.put(at + 12, 2, identity)
            self.memory.put(at + 14, 2, marks)
        self.unwritten.clear()
        old, self.published = self.published, self.staged
        return self.wants(self.driver_event, old, self.staged - old)

    def listen(self, wanted: bool) -> None:
        self.ask(self.device_event, wanted, self.taken)

    def wants_kick(self, available: int, more: int) -> bool:
        """Whether the driver has to notify when it has made the `more` descriptors from `available` on available."""
        return self.wants(self.device_event, available, more)
