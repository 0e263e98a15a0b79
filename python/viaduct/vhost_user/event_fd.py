"""The descriptors that carry kicks, calls and errors (vhost-user, "Support for platforms other than Linux").

A front-end may pass anything. What is neither an eventfd nor a pipe is refused: a write to it might block or reach a
file. Both kinds are made non-blocking; but that is a flag which the front-end shares and can take back at any moment,
so nothing relies on it: signals are given by `viaduct._core.signal_call`, and what is read is read with RWF_NOWAIT.
"""

from __future__ import annotations

import errno
import os
import select
import stat

from viaduct.vhost_user.errors import RequestError

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
        from viaduct._core import signal_call

        try:
            signal_call(fd)
        except OSError:
            return


def drain(fd: int) -> bool:
    """Takes signals that have come; there may be more. False if none can come any more: a pipe whose writer has
    gone."""
    try:
        # Once: what the front-end made of the descriptor (an eventfd that counts down) must not keep us reading.
        return bool(_read_now(fd))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _read_now(fd: int) -> int:
    """Reads what is there. Raises BlockingIOError if that is nothing, whatever the descriptor's own flags say."""
    try:
        return os.preadv(fd, [bytearray(_ROOM)], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    # A pipe, before Linux 6.4: only this process reads it, so what is there stays there.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(0):
        raise BlockingIOError
    return len(os.read(fd, _ROOM))
