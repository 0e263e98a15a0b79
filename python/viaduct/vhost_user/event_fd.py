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
_ROOM = 512
"""Bytes to read at once: an eventfd gives 8, a pipe what is in it."""


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
    """Signals once. Full, no reader left, the wrong end of a pipe: the front-end's loss, not our error."""
    if fd is not None:
        try:
            os.write(fd, _ONE)
        except OSError:
            return


def drain(fd: int) -> bool:
    """Takes signals that have come; there may be more. False if none can come any more: a pipe whose writer has
    gone."""
    try:
        # Once: what the front-end made of the descriptor (an eventfd that counts down) must not keep us reading.
        return bool(os.read(fd, _ROOM))
    except BlockingIOError:
        return True
    except OSError:
        return False
