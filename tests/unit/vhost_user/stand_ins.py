"""What stands in for the other side of the back-end: a device that records what it is told."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from viaduct.vhost_user import Device, Inflight, Peer, ProtocolFeature, Vring
from viaduct.virtio import DeviceFeature, DeviceType, NetFeature


async def until(condition: Callable[[], object]) -> None:
    """Waits for what shows itself in no event: a line in the log, a value in another object."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


class RecordingDevice(Device):
    """A network device with three queue pairs that supports everything and records every call."""

    device_id = DeviceType.NET
    features = int(
        DeviceFeature.VERSION_1 | DeviceFeature.RING_PACKED | DeviceFeature.EVENT_IDX | NetFeature.MAC | NetFeature.MTU
    )
    protocol_features = (
        Device.protocol_features
        | ProtocolFeature.MTU
        | ProtocolFeature.RARP
        | ProtocolFeature.CONFIG
        | ProtocolFeature.INFLIGHT_SHMFD
        | ProtocolFeature.LOG_SHMFD
    )
    queue_count = 6

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.base = 0
        """What the next `stop_queue` returns."""
        self.config = bytearray(range(32))
        self.failing: set[str] = set()
        """Methods that raise."""
        self.failures: list[str] = []
        """What `request_failed` was told."""
        self.memory: Any = None
        self.end = ""
        self.ended = asyncio.Event()

    def _record(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self.failing:
            raise RuntimeError(f"{name} failed on purpose")

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The recorded calls of one method."""
        return [call for call in self.calls if call[0] == name]

    def connected(self, peer: Peer) -> None:
        self._record("connected", peer)

    def disconnected(self, reason: str) -> None:
        self.memory = None
        self.end = reason
        self.ended.set()
        self._record("disconnected", reason)

    def request_failed(self, text: str) -> None:
        self.failures.append(text)

    def set_features(self, features: int) -> None:
        self._record("set_features", features)

    def set_memory(self, memory: Any) -> None:
        self._record("set_memory", memory.regions)
        self.memory = memory

    def start_queue(self, vring: Vring) -> None:
        self._record("start_queue", vring)

    def stop_queue(self, index: int) -> int:
        self._record("stop_queue", index)
        return self.base

    def enable_queue(self, index: int, enabled: bool) -> None:
        self._record("enable_queue", index, enabled)

    def set_call(self, index: int, fd: int | None) -> None:
        self._record("set_call", index, fd)

    def set_err(self, index: int, fd: int | None) -> None:
        self._record("set_err", index, fd)

    def read_config(self, offset: int, size: int) -> bytes:
        self._record("read_config", offset, size)
        return bytes(self.config[offset : offset + size])

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        self._record("write_config", offset, data, flags)
        self.config[offset : offset + len(data)] = data

    def reset(self) -> None:
        super().reset()
        self._record("reset")

    def set_mtu(self, mtu: int) -> None:
        self._record("set_mtu", mtu)

    def send_rarp(self, mac: bytes) -> None:
        self._record("send_rarp", mac)

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[int, int, int]:
        self._record("get_inflight", queue_count, queue_size)
        fd = os.memfd_create("inflight")
        os.ftruncate(fd, 8192)
        return fd, 8192, 0

    def set_inflight(self, inflight: Inflight) -> None:
        self._record(
            "set_inflight", inflight.mmap_size, inflight.mmap_offset, inflight.queue_count, inflight.queue_size
        )

    def set_log_addr(self, index: int, addr: int | None) -> None:
        self._record("set_log_addr", index, addr)
