"""The configuration space of a console (virtio 1.2, 5.3.4)."""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<HHII")

EMERGENCY_WRITE = 8
"""Offset of `ConsoleConfig.emerg_wr`."""


class ConsoleConfig(NamedTuple):
    """``struct virtio_console_config``; each field counts only if its feature was negotiated."""

    cols: int = 0
    """Columns, with VIRTIO_CONSOLE_F_SIZE."""
    rows: int = 0
    """Rows, with VIRTIO_CONSOLE_F_SIZE."""
    max_nr_ports: int = 1
    """With VIRTIO_CONSOLE_F_MULTIPORT."""
    emerg_wr: int = 0
    """With VIRTIO_CONSOLE_F_EMERG_WRITE: written by the driver, its low byte is output at once."""

    def pack(self) -> bytes:
        """The 12 bytes as they lie in configuration space."""
        return _LAYOUT.pack(*self)
