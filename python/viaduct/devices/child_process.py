"""Processes that end when this one does, however that ends."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """To be called in the child, between fork and exec: it gets SIGTERM when its parent's thread has ended."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
