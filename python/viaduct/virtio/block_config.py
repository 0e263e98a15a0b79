"""The configuration space of a block device (virtio 1.2, 5.2.4)."""

from __future__ import annotations

import struct

import msgspec

LAYOUT = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
WRITEBACK = 32
"""Offset of the only field that a driver writes."""


class BlockConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All fields, up to those of write zeroes. Sectors have 512 bytes whatever the block size."""

    capacity: int = 0
    """Sectors."""
    size_max: int = 0
    seg_max: int = 0
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    blk_size: int = 512
    """Bytes of a block: the unit that the driver should use."""
    physical_block_exp: int = 0
    """Logarithm of the number of blocks in a physical one."""
    alignment_offset: int = 0
    min_io_size: int = 0
    """Blocks."""
    opt_io_size: int = 0
    """Blocks; 0: not known."""
    writeback: int = 1
    """1: a flush makes writes durable; 0: each is durable when it ends (5.2.6.2)."""
    num_queues: int = 1
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    """Sectors."""
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0

    def pack(self) -> bytes:
        """The bytes of the space."""
        return LAYOUT.pack(*msgspec.structs.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> BlockConfig:
        """The fields in the first bytes of `data`. Raises struct.error if there are too few."""
        return cls(**dict(zip(cls.__struct_fields__, LAYOUT.unpack_from(data), strict=True)))
