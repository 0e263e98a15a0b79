"""The checksum of tables in a PC's memory: all bytes add up to 0."""

from __future__ import annotations


def with_checksum(table: bytes, offset: int) -> bytes:
    """The table with the byte at `offset`, which is 0 so far, such that all bytes add up to 0 modulo 256."""
    return table[:offset] + bytes([-sum(table) & 0xFF]) + table[offset + 1 :]
