"""The eventfd by which the data path tells the control side that something waits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def event_fd_of(loop: asyncio.AbstractEventLoop, signalled: Callable[[], None]) -> Iterator[int]:
    """An eventfd that calls `signalled` on the loop."""
    event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def drain() -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(event_fd)
        signalled()

    loop.add_reader(event_fd, drain)
    try:
        yield event_fd
    finally:
        loop.remove_reader(event_fd)
        os.close(event_fd)
