"""The configuration space of a filesystem (virtio 1.2, 5.11.4)."""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<36sI")

TAG_MAX = 36
"""Bytes of a tag."""


class FsConfig(NamedTuple):
    """``struct virtio_fs_config`` up to `num_request_queues`."""

    tag: str
    """The name under which the guest mounts it: 1 to 36 bytes of UTF-8, none of them 0."""
    num_request_queues: int = 1
    """Queues beside the one for urgent requests."""

    def pack(self) -> bytes:
        """The 40 bytes as they lie in configuration space. Raises ValueError for a tag that cannot be."""
        raw = self.tag.encode()
        if not 1 <= len(raw) <= TAG_MAX or b"\0" in raw:
            raise ValueError(
                f"tag {self.tag!r} has {len(raw)} bytes: 1 to {TAG_MAX}, none of them 0 (virtio 1.2, 5.11.4)"
            )
        return _LAYOUT.pack(raw, self.num_request_queues)
