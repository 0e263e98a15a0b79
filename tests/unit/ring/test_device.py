"""Our device side against a driver written straight from the specification."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings

from viaduct._core import Chain, DeviceQueue, RingError

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
from .shared_memory import BUFFERS, Queue, SharedMemory


def start(memory: SharedMemory, queue: Queue) -> DeviceQueue:
    descriptor, driver, device = queue.addresses
    return DeviceQueue(
        memory.table,
        layout=queue.layout,
        size=queue.size,
        descriptor_addr=descriptor,
        driver_addr=driver,
        device_addr=device,
        base=queue.base,
        event_idx=queue.event_idx,
        indirect=queue.indirect,
        in_order=queue.in_order,
    )


class History:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.memory = SharedMemory()
        model = split_model if queue.layout == "split" else packed_model
        self.driver = model.Driver(self.memory, queue, random.Random(queue.base))
        self.device = start(self.memory, queue)
        self.places = Places()
        self.sent: dict[int, Sent] = {}
        self.tokens = 0
        self.added: deque[int] = deque()
        self.available: deque[int] = deque()
        self.popped: list[tuple[int, Chain]] = []
        self.pushed: deque[int] = deque()
        self.used: deque[int] = deque()
        # How far the device has shown its work, counted as the model counts, and whether it has notified before.
        self.shown = self.driver.taken
        self.first = True

    def step(self, step: Step) -> None:
        match step:
            case Add():
                self.add(step)
            case Kick():
                kicked = self.driver.publish()
                if self.queue.layout == "split" and not self.queue.event_idx and self.added:
                    assert kicked == (self.memory.get(self.driver.used, 2) == 0)
                self.available += self.added
                self.added.clear()
            case Take(most):
                for _ in range(most):
                    self.take()
            case Pop(most):
                for _ in range(most):
                    self.pop()
            case Push(most, seed, _):
                self.push(most, seed)
            case Publish():
                self.publish()
            case Listen(True, wanted):
                self.driver.listen(wanted)
            case Listen(False, wanted):
                self.listen(wanted)
            case Restart():
                # A packed ring is compared with the base, and a driver in the middle of a list can be misread.
                self.step(Kick())
                self.publish()
                self.device = start(self.memory, self.queue.at(self.device.base))
                self.first = True

    def add(self, step: Add) -> None:
        count = len(step.out) + len(step.writable)
        table = self.places.next_table() if step.table and self.queue.indirect and count else None
        if not count or (table is None and count > self.queue.size):
            return
        out, writable = self.places.elements(step.out), self.places.elements(step.writable)
        bytes_out = content(self.tokens, sum(step.out))
        if self.driver.add(out, writable, self.tokens, table):
            self.memory.scatter(out, bytes_out)
            slots = count if self.queue.layout == "packed" and table is None else 1
            self.sent[self.tokens] = Sent(out, writable, bytes_out, slots)
            self.added.append(self.tokens)
            self.tokens += 1

    def pop(self) -> None:
        chain = self.device.pop()
        if not self.available:
            assert chain is None
            return
        assert chain is not None
        token = self.available.popleft()
        sent = self.sent[token]
        assert chain.read() == sent.content
        assert (chain.readable_len, chain.writable_len) == (len(sent.content), sent.room)
        written = answer(token, sent.room)
        half = len(written) // 2
        chain.write(written[:half])
        chain.write(written[half:])
        assert chain.written == len(written)
        with pytest.raises(ValueError, match="room for"):
            chain.write(bytes(sent.room - len(written) + 1))
        self.popped.append((token, chain))

    def push(self, most: int, seed: int) -> None:
        for step in range(min(most, len(self.popped))):
            token, chain = self.popped.pop(0 if self.queue.in_order else (seed + step) % len(self.popped))
            self.device.push(chain)
            self.pushed.append(token)

    def publish(self) -> None:
        more = sum(self.sent[token].slots for token in self.pushed)
        wanted = self.driver.wants_call(self.shown, more)
        called = self.device.publish()
        if more and self.first and self.queue.event_idx:
            # Nobody knows what was announced before this device started: one notification too many is allowed.
            assert called >= wanted
            self.first = False
        else:
            assert called == wanted
        self.shown += more
        self.used += self.pushed
        self.pushed.clear()

    def listen(self, wanted: bool) -> None:
        if not wanted:
            self.device.disable_notifications()
            return
        assert self.device.enable_notifications() == bool(self.available)
        if not self.available and not self.added:
            # The very next buffer is the one it wants to hear of.
            self.step(Add([1], [], False))
            if self.added:
                assert self.driver.publish()
                self.available += self.added
                self.added.clear()

    def take(self) -> None:
        taken = self.driver.take()
        if not self.used:
            assert taken is None
            return
        token = self.used.popleft()
        sent = self.sent.pop(token)
        expected = answer(token, sent.room)
        assert taken == (token, len(expected))
        assert self.memory.gather(sent.writable)[: len(expected)] == expected

    def finish(self) -> None:
        self.step(Kick())
        while self.sent:
            for step in (Pop(20), Push(20, 3, False), Publish(), Take(20)):
                self.step(step)
        half = self.device.base & 0xFFFF
        if self.queue.layout == "packed":
            assert self.device.base >> 16 == half == self.driver.encoded(self.driver.added)
        else:
            assert self.device.base == half == self.driver.added % (1 << 16)


@settings(max_examples=300, deadline=None)
@given(queues(), steps)
def test_every_legal_history_delivers_every_buffer_once(queue: Queue, steps: list[Step]) -> None:
    history = History(queue)
    for step in steps:
        if isinstance(step, Restart) and history.popped:
            continue  # chains belong to the queue object that gave them out
        history.step(step)
    history.finish()


def available_chain(layout: str) -> tuple[SharedMemory, DeviceQueue]:
    queue = Queue("split", 4, 0, False, False, False)
    if layout == "packed":
        queue = Queue("packed", 4, 0x8000_8000, False, False, False)
    history = History(queue)
    history.step(Add([4], [8], False))
    history.step(Kick())
    return history.memory, history.device


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_chain_is_given_back_once_and_to_its_own_queue(layout: str) -> None:
    _, device = available_chain(layout)
    _, other = available_chain(layout)
    chain = device.pop()
    assert chain is not None
    with pytest.raises(ValueError, match="another queue"):
        other.push(chain)
    with pytest.raises(ValueError, match="room for 8"):
        device.push(chain, 9)
    device.push(chain, 8)
    with pytest.raises(ValueError, match="given back already"):
        device.push(chain, 8)
    with pytest.raises(ValueError, match="belongs to the driver"):
        chain.write(b"x")


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_broken_rule_names_itself_and_breaks_the_queue(layout: str) -> None:
    memory, device = available_chain(layout)
    for index in range(4):
        memory.put(16 * index, 8, 1 << 40)
    for _ in range(2):
        with pytest.raises(RingError, match=r"0x10000000000, 4 bytes, is not in guest memory \(virtio 1\.2, 2\.7\.5"):
            device.pop()
    assert device.error is not None
    assert "0x10000000000" in device.error


def test_a_layout_has_one_of_two_names() -> None:
    with pytest.raises(ValueError, match='"split" or "packed"'):
        DeviceQueue(
            SharedMemory().table,
            layout="round",  # type: ignore[arg-type]
            size=4,
            descriptor_addr=0,
            driver_addr=BUFFERS,
            device_addr=BUFFERS + 64,
        )
