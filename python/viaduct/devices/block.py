"""A block device (virtio 1.2, 5.2): a disk that lies in a file.

Requests are served by threads in Rust (`viaduct._core.BlockDevice`), one for each queue that the driver uses; this is
what the transport and the person who runs it see of them. ``docs/block.md`` says what is durable when, which formats
there are, and what happens when the disk fails.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from viaduct import _core
from viaduct.vhost_user.device import Device, Vring
from viaduct.vhost_user.errors import RequestError
from viaduct.vhost_user.event_fd import drain
from viaduct.vhost_user.inflight import InflightDevice
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.virtio.block_config import WRITEBACK, BlockConfig
from viaduct.virtio.features import BlockFeature, DeviceFeature, DeviceType

if TYPE_CHECKING:
    from viaduct.vhost_user.handover import Fds

log = logging.getLogger("viaduct.device")

Format = Literal["raw", "qcow2"]
ImageError = _core.ImageError

SECTOR = 512
SERIAL_MAX = 20
"""Bytes of a serial number (virtio 1.2, 5.2.6)."""
QUEUES_MAX = 256
SEG_MAX = 126
"""Pieces of data in a request: two descriptors less than the smallest queue that front-ends make, QEMU's 128, because
no chain may be longer than the queue (virtio 1.2, 2.7.5.3.1), whether in an indirect table or not."""
PHYSICAL_BLOCK_EXP = 3
"""Blocks of 512 bytes, but better 4096 at a time: the page of the host's cache."""
DISCARD_SECTORS = 1 << 21
ZEROES_SECTORS = 1 << 16
SEGMENTS = 64
"""Limits that the Rust half checks (`crates/devices/src/block/request.rs`)."""
LINES_MAX = 10
"""Lines in the log each second about requests that failed: a guest can make as many as it likes."""


class BlockDevice(InflightDevice):
    """A disk for one driver.

    `path`: the image, a file or a block device. `format`: ``"raw"``, ``"qcow2"``; None: qcow2 if the name ends so, else
    raw. `queues`: 1 to 256. `serial`: up to 20 bytes, what Linux shows in /sys/block/vd?/serial. `io_uring`: use it
    where the system has it.

    Raises `ImageError` where the image is missing, locked by another machine or damaged, ValueError for the rest.
    """

    device_id = DeviceType.BLOCK
    protocol_features = (
        Device.protocol_features | ProtocolFeature.CONFIG | ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.LOG_SHMFD
    )
    config_size = len(BlockConfig().pack())

    def __init__(
        self,
        path: str | Path,
        *,
        format: Format | None = None,
        read_only: bool = False,
        queues: int = 1,
        serial: str = "",
        io_uring: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= queues <= QUEUES_MAX:
            raise ValueError(f"{queues} queues; 1 to {QUEUES_MAX} are possible")
        if len(serial.encode()) > SERIAL_MAX:
            raise ValueError(f"serial {serial!r} has more than {SERIAL_MAX} bytes (virtio 1.2, 5.2.6)")
        self.path, self.read_only = Path(path), read_only
        self.queue_count = queues
        self.memory: _core.GuestMemory | None = None
        """The guest's memory, while there is one."""
        self.write_back = True
        """The configuration's `writeback`."""
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._core = _core.BlockDevice(
                self.path,
                self._event_fd,
                format=format,
                read_only=read_only,
                serial=serial.encode(),
                io_uring=io_uring,
            )
        except BaseException:
            os.close(self._event_fd)
            raise
        self.features = _features(read_only)
        self._queues: set[int] = set()
        self._drained: dict[int, asyncio.Future[None]] = {}
        self._watching: asyncio.AbstractEventLoop | None = None
        self._lines = 0
        self._next_second: asyncio.TimerHandle | None = None

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._core.size

    @property
    def format(self) -> str:
        """``"raw"`` or ``"qcow2"``."""
        return self._core.format

    def stats(self) -> dict[str, int]:
        """What was done so far: reads, bytes_read, writes, bytes_written, flushes, discards, failed, refused."""
        return self._core.stats()

    def close(self) -> None:
        """Stops all queues and lets the image go. May be called twice; nothing else may be called after it."""
        for index in list(self._queues):
            self.stop_queue(index)
        self._unwatch()
        self.forget_inflight()
        if self._event_fd >= 0:
            os.close(self._event_fd)
            self._event_fd = -1
            del self._core

    # What was agreed on.

    def set_features(self, features: int) -> None:
        self.negotiated = features
        self._core.set_features(features)

    def set_memory(self, memory: _core.GuestMemory) -> None:
        self._core.set_memory(memory)
        self.memory = memory

    @property
    def config(self) -> BlockConfig:
        """The configuration space."""
        writable = not self.read_only
        return BlockConfig(
            capacity=self.size // SECTOR,
            seg_max=SEG_MAX,
            blk_size=SECTOR,
            physical_block_exp=PHYSICAL_BLOCK_EXP,
            min_io_size=1 << PHYSICAL_BLOCK_EXP,
            writeback=int(self.write_back),
            num_queues=self.queue_count,
            max_discard_sectors=DISCARD_SECTORS if writable else 0,
            max_discard_seg=SEGMENTS if writable else 0,
            discard_sector_alignment=1 << PHYSICAL_BLOCK_EXP if writable else 0,
            max_write_zeroes_sectors=ZEROES_SECTORS if writable else 0,
            max_write_zeroes_seg=SEGMENTS if writable else 0,
            write_zeroes_may_unmap=int(writable),
        )

    def read_config(self, offset: int, size: int) -> bytes:
        return self.config.pack().ljust(offset + size, b"\0")[offset : offset + size]

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        place = WRITEBACK - offset
        migrating = flags == 1  # All of the space, as it was at the other end.
        if not (migrating or (place == 0 and len(data) == 1)) or not 0 <= place < len(data):
            raise RequestError(
                f"{len(data)} bytes written at offset {offset} of the configuration",
                f"`writeback`, the byte at offset {WRITEBACK}",
                "virtio 1.2, 5.2.4",
            )
        if not migrating and not self.negotiated & BlockFeature.CONFIG_WCE:
            raise RequestError(
                "`writeback` written without VIRTIO_BLK_F_CONFIG_WCE", "after negotiating it", "virtio 1.2, 5.2.5.2"
            )
        if data[place] > 1:
            raise RequestError(f"`writeback` {data[place]}", "0 or 1", "virtio 1.2, 5.2.4")
        self._set_write_back(bool(data[place]))

    def _set_write_back(self, write_back: bool) -> None:
        self.write_back = write_back
        self._core.set_write_back(write_back)

    def set_status(self, status: int) -> None:
        super().set_status(status)
        if not status:
            self._set_write_back(True)

    def reset(self) -> None:
        super().reset()
        self._set_write_back(True)

    def disconnected(self, reason: str) -> None:
        self.memory = None
        self.forget_inflight()
        self._set_write_back(True)

    def save(self, fds: Fds) -> dict[str, Any]:
        return super().save(fds) | {"write_back": self.write_back}

    def restore(self, data: dict[str, Any], fds: Fds) -> None:
        super().restore(data, fds)
        self._set_write_back(bool(data.get("write_back", True)))

    # Queues.

    def start_queue(self, vring: Vring) -> None:
        assert self.memory is not None
        self._core.start_queue(
            vring.index,
            self.memory,
            layout="packed" if self.packed else "split",
            size=vring.size,
            descriptor_addr=vring.descriptor_addr,
            driver_addr=vring.driver_addr,
            device_addr=vring.device_addr,
            base=vring.base,
            event_idx=bool(self.negotiated & DeviceFeature.EVENT_IDX),
            indirect=bool(self.negotiated & DeviceFeature.INDIRECT_DESC),
            kick_fd=vring.kick_fd,
            call_fd=vring.call_fd,
            log_addr=vring.log_addr,
            inflight=self.inflight_region(vring.index),
        )
        self._queues.add(vring.index)
        self._watch()

    def enable_queue(self, index: int, enabled: bool) -> None:
        self._core.enable_queue(index, enabled)

    async def drain_queue(self, index: int) -> None:
        if index not in self._queues:
            return
        drained = self._drained.setdefault(index, asyncio.get_running_loop().create_future())
        self._core.drain_queue(index)
        await asyncio.shield(drained)

    def stop_queue(self, index: int) -> int:
        self._queues.discard(index)
        base = self._core.stop_queue(index)
        self._report()  # What happened last, drained or not.
        self._end_drain(index)
        if not self._queues:
            self._unwatch()
        return base

    def set_call(self, index: int, fd: int | None) -> None:
        self._core.set_call(index, fd)

    def set_log_addr(self, index: int, addr: int | None) -> None:
        self._core.set_log_addr(index, addr)

    # What the threads have to tell.

    def _watch(self) -> None:
        if self._watching is None:
            self._watching = asyncio.get_running_loop()
            self._watching.add_reader(self._event_fd, self._report)

    def _unwatch(self) -> None:
        if self._watching is not None:
            self._watching.remove_reader(self._event_fd)
            self._watching = None
        if self._next_second is not None:
            self._next_second.cancel()
            self._begin_second()

    def _end_drain(self, index: int) -> None:
        if (drained := self._drained.pop(index, None)) is not None and not drained.done():
            drained.set_result(None)

    def _report(self) -> None:
        drain(self._event_fd)
        for kind, queue, message, missed in self._core.take_events():
            match kind:
                case "drained":
                    self._end_drain(queue)
                case "ring":
                    self._soon(self._fail, queue, message)
                case "memory":
                    self._soon(self._disconnect, queue, message)
                case _:
                    self._log(kind, queue, message, missed)

    def _soon(self, what: Callable[[int, str], None], queue: int, message: str) -> None:
        """Tells the transport, but not at once: it may stop queues, and one is perhaps just being stopped."""
        asyncio.get_running_loop().call_soon(what, queue, message)

    def _fail(self, queue: int, message: str) -> None:
        if self.transport is not None and queue in self._queues:
            self.transport.fail_queue(queue, message)

    def _disconnect(self, queue: int, message: str) -> None:
        if self.transport is not None and self._queues:
            self.transport.disconnect(message)

    def _log(self, kind: str, queue: int, message: str, missed: int) -> None:
        self._lines += 1
        if self._next_second is None and self._watching is not None:
            self._next_second = self._watching.call_later(1, self._begin_second)
        if self._lines > LINES_MAX:
            return
        more = f" (and {missed} others before)" if missed else ""
        level = logging.ERROR if kind == "disk" else logging.WARNING
        log.log(level, "disk %s, queue %d: %s%s", self.path, queue, message, more)

    def _begin_second(self) -> None:
        self._next_second = None
        if self._lines > LINES_MAX:
            log.warning("disk %s: %d more messages of this kind in a second", self.path, self._lines - LINES_MAX)
        self._lines = 0


def _features(read_only: bool) -> int:
    features = (
        DeviceFeature.VERSION_1
        | DeviceFeature.RING_PACKED
        | DeviceFeature.INDIRECT_DESC
        | DeviceFeature.EVENT_IDX
        | DeviceFeature.LOG_ALL
        | BlockFeature.SEG_MAX
        | BlockFeature.BLK_SIZE
        | BlockFeature.TOPOLOGY
        | BlockFeature.FLUSH
        | BlockFeature.CONFIG_WCE
        | BlockFeature.MQ
    )
    return features | (BlockFeature.RO if read_only else BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES)
