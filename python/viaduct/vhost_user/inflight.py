"""The buffer that tracks requests in flight, so that a restarted back-end goes on without losing or repeating one.

The front-end asks for it with GET_INFLIGHT_FD, keeps it, and gives it to this back-end and the next with
SET_INFLIGHT_FD (vhost-user, "Inflight I/O tracking"). It has one region for each queue, which the ring engine writes
(`viaduct._core.DeviceQueue.attach_inflight`): what was taken and not given back is taken again first.

A device that offers this derives from `InflightDevice` and attaches the region that `inflight_region` names to each
queue that it starts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from viaduct.vhost_user.device import Device, Inflight
from viaduct.vhost_user.errors import RequestError
from viaduct.virtio.features import DeviceFeature

if TYPE_CHECKING:
    from viaduct.vhost_user.handover import Fds

SECTION = 'vhost-user, "Inflight I/O tracking"'


def region_size(queue_size: int, *, packed: bool) -> int:
    """Bytes of one queue's region."""
    from viaduct._core import inflight_bytes

    return inflight_bytes("packed" if packed else "split", queue_size)


class InflightBuffer:
    """A buffer that SET_INFLIGHT_FD gave. Owns a descriptor of it."""

    def __init__(self, inflight: Inflight) -> None:
        """Duplicates the descriptor. Raises OSError if this process may open no more."""
        self.size, self.offset = inflight.mmap_size, inflight.mmap_offset
        self.queue_count, self.queue_size = inflight.queue_count, inflight.queue_size
        self.fd = os.dup(inflight.fd)

    def region(self, index: int, *, packed: bool) -> tuple[int, int]:
        """Descriptor and offset of a queue's region. Raises `RequestError` if the buffer has none."""
        size = region_size(self.queue_size, packed=packed)
        if index >= self.queue_count or (index + 1) * size > self.size:
            raise RequestError(
                f"a buffer of {self.size} bytes for {self.queue_count} queues of {self.queue_size}, for queue {index}",
                f"{(index + 1) * size} bytes or more, for more than {index} queues",
                SECTION,
            )
        return self.fd, self.offset + index * size

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)


class InflightDevice(Device):
    """A device that can track requests in flight, if the front-end wants it."""

    def __init__(self) -> None:
        self.negotiated = 0
        """The features in force, without VHOST_USER_F_PROTOCOL_FEATURES."""
        self._inflight: InflightBuffer | None = None

    @property
    def packed(self) -> bool:
        """The layout of the virtqueues (virtio 1.2, 2.6)."""
        return bool(self.negotiated & DeviceFeature.RING_PACKED)

    def get_inflight(self, queue_count: int, queue_size: int) -> tuple[int, int, int]:
        size = queue_count * region_size(queue_size, packed=self.packed)
        fd = os.memfd_create("viaduct inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        return fd, size, 0

    def set_inflight(self, inflight: Inflight) -> None:
        self._replace(InflightBuffer(inflight))

    def inflight_region(self, index: int) -> tuple[int, int] | None:
        """Descriptor and offset of the region of queue `index`; None if requests are not tracked. Raises
        `RequestError`."""
        return None if self._inflight is None else self._inflight.region(index, packed=self.packed)

    def forget_inflight(self) -> None:
        """The front-end has gone, and its buffer with it."""
        self._replace(None)

    def save(self, fds: Fds) -> dict[str, Any]:
        saved = super().save(fds)
        if (buffer := self._inflight) is not None:
            place = fds.add(buffer.fd)
            saved["inflight"] = [place, buffer.size, buffer.offset, buffer.queue_count, buffer.queue_size]
        return saved

    def restore(self, data: dict[str, Any], fds: Fds) -> None:
        super().restore(data, fds)
        if inflight := data.get("inflight"):
            place, *numbers = inflight
            fd = fds.need(place)
            try:
                self.set_inflight(Inflight(fd, *numbers))
            finally:
                os.close(fd)

    def _replace(self, buffer: InflightBuffer | None) -> None:
        old, self._inflight = self._inflight, buffer
        if old is not None:
            old.close()
