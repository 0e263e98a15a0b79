"""What a machine raises."""

from __future__ import annotations


class MachineError(Exception):
    """The machine cannot be had as it was asked for, or not go on: the text says why, and what to do about it."""
