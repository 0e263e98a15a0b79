"""The descriptors that carry kicks, calls and errors (vhost-user, "Support for platforms other than Linux").

A front-end may pass anything. What is neither an eventfd nor a pipe is refused: a write to it might block or reach a
file. Both kinds are made non-blocking, so that a front-end that filled the counter or the pipe does not stop us.
"""

from __future__ import annotations

import os
import stat
import struct

from viaduct.vhost_user.errors import RequestError

_ONE = struct.pack("=Q", 1)
_WORD = 8


def check_event_fd(fd: int) -> None:
    """Raises `RequestError` unless `fd` is an eventfd or a pipe; makes it non-blocking."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        target = os.readlink(f"/proc/self/fd/{fd}")
        if target != "anon_inode:[eventfd]":
            raise RequestError(
                f"a file descriptor of {target}",
                "an eventfd or a pipe",
                'vhost-user, "Support for platforms other than Linux"',
            )
    os.set_blocking(fd, False)


def signal(fd: int | None) -> None:
    """Signals once; a peer that is gone or does not read is no error."""
    if fd is not None:
        try:
            os.write(fd, _ONE)
        except (BlockingIOError, BrokenPipeError):
            return


def drain(fd: int) -> None:
    """Takes the signals that have come."""
    try:
        while len(os.read(fd, _WORD)) == _WORD:
            pass
    except BlockingIOError:
        return
