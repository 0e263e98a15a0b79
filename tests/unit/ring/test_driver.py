"""Our driver side against a device written straight from the specification."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings

from viaduct._core import DriverQueue, RingError

from . import packed_model, split_model
from .histories import (
    Add,
    Kick,
    Listen,
    Places,
    Pop,
    Publish,
    Push,
    Restart,
    Sent,
    Step,
    Take,
    answer,
    content,
    queues,
    steps,
)
from .shared_memory import BUFFERS, TABLES, Element, Queue, SharedMemory

TABLES_LENGTH = 1 << 18


def start(memory: SharedMemory, queue: Queue) -> DriverQueue:
    descriptor, driver, device = queue.addresses
    return DriverQueue(
        memory.table,
        layout=queue.layout,
        size=queue.size,
        descriptor_addr=descriptor,
        driver_addr=driver,
        device_addr=device,
        base=queue.base,
        event_idx=queue.event_idx,
        in_order=queue.in_order,
        tables=(TABLES, TABLES_LENGTH) if queue.indirect else None,
    )


class History:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.memory = SharedMemory()
        # What was in the memory before must not matter.
        self.memory.write(0, b"\xa5" * BUFFERS)
        self.driver = start(self.memory, queue)
        model = split_model if queue.layout == "split" else packed_model
        self.device = model.Device(self.memory, queue)
        self.places = Places()
        self.sent: dict[int, Sent] = {}
        self.tokens = 0
        self.added: deque[int] = deque()
        self.available: deque[int] = deque()
        # (token, id as the ring names it)
        self.popped: list[tuple[int, int]] = []
        self.pushed: deque[tuple[int, int]] = deque()
        self.used: deque[tuple[int, int]] = deque()
        self.shown = self.device.taken

    def step(self, step: Step) -> None:
        match step:
            case Add():
                self.add(step)
            case Kick():
                self.kick()
            case Take(most):
                for _ in range(most):
                    self.take()
            case Pop(most):
                for _ in range(most):
                    self.pop()
            case Push(most, seed, together):
                self.push(most, seed, together)
            case Publish():
                self.device.publish()
                self.used += self.pushed
                self.pushed.clear()
            case Listen(False, wanted):
                self.device.listen(wanted)
            case Listen(True, wanted):
                self.listen(wanted)
            case Restart():
                self.restart()

    def add(self, step: Add) -> None:
        count = len(step.out) + len(step.writable)
        out, writable = self.places.elements(step.out), self.places.elements(step.writable)
        table = self.queue.indirect and 1 < count <= TABLES_LENGTH // 16 // self.queue.size
        slots = 1 if table else count
        free = self.driver.free
        if count == 0 or slots > self.queue.size:
            with pytest.raises(RingError, match=f"a buffer of {count} descriptors"):
                self.driver.add(out, writable, self.tokens)
        elif self.driver.add(out, writable, self.tokens):
            assert self.driver.free == free - slots
            bytes_out = content(self.tokens, sum(step.out))
            self.memory.scatter(out, bytes_out)
            packed = self.queue.layout == "packed"
            self.sent[self.tokens] = Sent(out, writable, bytes_out, slots if packed else 1)
            self.added.append(self.tokens)
            self.tokens += 1
        else:
            assert free < slots

    def kick(self) -> None:
        more = sum(self.sent[token].slots for token in self.added)
        wanted = self.device.wants_kick(self.shown, more)
        assert self.driver.kick() == wanted
        self.shown += more
        self.available += self.added
        self.added.clear()

    def pop(self) -> None:
        popped = self.device.pop()
        if not self.available:
            assert popped is None
            return
        assert popped is not None
        identity, out, writable = popped
        token = self.available.popleft()
        sent = self.sent[token]
        assert (out, writable) == (sent.out, sent.writable)
        assert self.memory.gather(out) == sent.content
        self.memory.scatter(writable, answer(token, sent.room))
        self.popped.append((token, identity))

    def push(self, most: int, seed: int, together: bool) -> None:
        count = min(most, len(self.popped))
        if self.queue.in_order and together and count:
            batch, self.popped = self.popped[:count], self.popped[count:]
            last = batch[-1][0]
            elements = deque((identity, len(answer(token, self.sent[token].room))) for token, identity in batch)
            self.device.push(elements)
            # All but the last count as completely written (2.7.9, 2.8.8).
            self.pushed += [(token, elements[-1][1] if token == last else self.sent[token].room) for token, _ in batch]
            return
        for step in range(count):
            token, identity = self.popped.pop(0 if self.queue.in_order else (seed + step) % len(self.popped))
            written = len(answer(token, self.sent[token].room))
            self.device.push(deque([(identity, written)]))
            self.pushed.append((token, written))

    def take(self) -> None:
        taken = self.driver.take()
        if not self.used:
            assert taken is None
            return
        expected = self.used.popleft()
        assert taken == expected
        token = expected[0]
        sent = self.sent.pop(token)
        written = answer(token, sent.room)
        assert self.memory.gather(sent.writable)[: len(written)] == written

    def listen(self, wanted: bool) -> None:
        if not wanted:
            self.driver.disable_notifications()
            return
        # The rest of a batch that came with one used element is the driver's already.
        there = self.driver.enable_notifications()
        if not self.used:
            assert not there
        if not self.used and not self.pushed and self.popped:
            self.push(1, 0, False)
            assert self.device.publish(), "the very next buffer is the one it wants to hear of"
            self.used += self.pushed
            self.pushed.clear()
            assert self.driver.enable_notifications()

    def restart(self) -> None:
        if self.sent:
            return
        queue = self.queue.at(self.driver.base)
        self.driver = start(self.memory, queue)
        self.device = type(self.device)(self.memory, queue)
        self.shown = self.device.taken

    def finish(self) -> None:
        self.kick()
        while self.sent:
            for step in (Pop(20), Push(20, 3, False), Publish(), Take(20)):
                self.step(step)
        assert self.driver.free == self.queue.size


@settings(max_examples=300, deadline=None)
@given(queues(), steps)
def test_every_legal_history_returns_every_buffer_once(queue: Queue, steps: list[Step]) -> None:
    history = History(queue)
    for step in steps:
        history.step(step)
    history.finish()


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_device_that_invents_a_buffer_is_refused(layout: str) -> None:
    queue = Queue("split", 4, 0, False, False, False)
    if layout == "packed":
        queue = Queue("packed", 4, 0x8000_8000, False, False, False)
    history = History(queue)
    history.step(Add([], [8], False))
    history.step(Kick())
    popped = history.device.pop()
    assert popped is not None
    identity, _, writable = popped
    assert writable == [Element(BUFFERS, 8)]
    if isinstance(history.device, packed_model.Device):
        history.device.slots[3] = 1
    history.device.push(deque([((identity + 3) % 4, 1)]))
    history.device.publish()
    for _ in range(2):
        with pytest.raises(RingError, match=r"used buffer 3, which is not outstanding \(virtio 1\.2, 2\.7\.8"):
            history.driver.take()
