"""A guest's driver of one queue, whose rings lie in a machine's RAM."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from viaduct._core import DriverQueue
from viaduct.vhost_user.device import Vring
from viaduct.vhost_user.ring import PACKED_START
from viaduct.virtio import DeviceFeature
from viaduct.vmm.ram import Ram

SIZE = 16
RINGS, BUFFERS = 0x10000, 0x20000


class RingDriver:
    """Asks a device one request after the other. `features`: what driver and device have agreed upon. `offset`: of all
    its memory, for drivers side by side."""

    def __init__(self, ram: Ram, features: int, index: int = 0, offset: int = 0) -> None:
        layout: Literal["split", "packed"] = "packed" if features & DeviceFeature.RING_PACKED else "split"
        self.memory = ram.memory
        self.kick, self.call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
        self.buffers = BUFFERS + offset
        places = (RINGS + offset, RINGS + 0x1000 + offset, RINGS + 0x2000 + offset)
        self.vring = Vring(index, SIZE, *places, PACKED_START if layout == "packed" else 0, self.kick, self.call, None)
        self.queue = DriverQueue(
            self.memory,
            layout=layout,
            size=SIZE,
            descriptor_addr=places[0],
            driver_addr=places[1],
            device_addr=places[2],
            event_idx=bool(features & DeviceFeature.EVENT_IDX),
        )

    async def ask(self, text: bytes) -> bytes:
        """The device's answer."""
        self.post(text)
        return await self.answer()

    def post(self, text: bytes) -> None:
        """Makes a request available and kicks the device."""
        self.memory.write(self.buffers, text)
        assert self.queue.add([(self.buffers, len(text))], [(self.buffers + 0x1000, 0x1000)], 1)
        self.queue.kick()
        os.eventfd_write(self.kick, 1)

    async def answer(self) -> bytes:
        """The next answer."""
        async with asyncio.timeout(30):
            while True:
                if (taken := self.queue.take()) is not None:
                    return self.memory.read(self.buffers + 0x1000, taken[1])
                await asyncio.sleep(0.002)

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)
