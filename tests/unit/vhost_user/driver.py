"""A driver for request queues: puts text into buffers, waits, reads what came back."""

from __future__ import annotations

import asyncio
import os

from viaduct._core import DriverQueue, GuestMemory
from viaduct.vhost_user import FrontEnd
from viaduct.virtio import DeviceFeature

ROOM = 1 << 17


class Driver:
    """Drives one queue of a started front-end."""

    def __init__(self, fe: FrontEnd, index: int) -> None:
        self.queue = fe.queues[index]
        self.memory = GuestMemory().with_region(0, fe.memory_size, fe.user_base, 0, fe.memory_fd)
        self.core = DriverQueue(
            self.memory,
            layout="packed" if fe.layout == "packed" else "split",
            size=self.queue.size,
            descriptor_addr=fe.user_base + self.queue.descriptor_addr,
            driver_addr=fe.user_base + self.queue.driver_addr,
            device_addr=fe.user_base + self.queue.device_addr,
            base=self.queue.base,
            event_idx=bool(fe.features & DeviceFeature.EVENT_IDX),
        )
        self.start = fe.data_addr + index * ROOM
        self.order: list[int] = []
        """Tokens in the order in which they came back."""

    async def ask(self, text: bytes, room: int) -> bytes:
        """Sends one request with `room` bytes for the answer, and returns the answer."""
        (answer,) = await self.ask_all([text], room)
        return answer

    async def ask_all(self, texts: list[bytes], room: int) -> list[bytes]:
        """Makes all requests available at once; returns the answers in the order of the requests."""
        step = room + 4096
        for token, text in enumerate(texts):
            place = self.start + token * step
            self.memory.write(place, text)
            out = [(place, len(text))] if text else []
            assert self.core.add(out, [(place + 4096, room)], token)
        if self.core.kick():
            os.eventfd_write(self.queue.kick_fd, 1)
        answers: dict[int, bytes] = {}
        while len(answers) < len(texts):
            while (taken := self.core.take()) is not None:
                token, written = taken
                self.order.append(token)
                answers[token] = self.memory.read(self.start + token * step + 4096, written)
            if len(answers) < len(texts) and not self.core.enable_notifications():
                await self._called()
        return [answers[token] for token in range(len(texts))]

    async def _called(self) -> None:
        loop = asyncio.get_running_loop()
        called = asyncio.Event()
        loop.add_reader(self.queue.call_fd, called.set)
        try:
            await called.wait()
        finally:
            loop.remove_reader(self.queue.call_fd)
        os.eventfd_read(self.queue.call_fd)
