"""What a hostile front-end passes where an eventfd or memory is wanted, and what it does to memory files.

Every function returns a descriptor that the caller closes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import socket
import struct
import tempfile
import time

PAGE = 4096
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1033, 2, 4, 8
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
UNTIL_FULL = struct.pack("=Q", (1 << 64) - 2)
"""The most that an eventfd's counter holds."""

_libc = ctypes.CDLL(None, use_errno=True)


def memory(size: int) -> int:
    """An ordinary memory file; sparse, however large."""
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def punch(fd: int, start: int, size: int) -> None:
    """Takes pages out of a memory file."""
    flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    _libc.fallocate(fd, flags, ctypes.c_int64(start), ctypes.c_int64(size))


def sealed(size: int, seals: int) -> int:
    """A memory file that can no longer be changed in some way."""
    fd = memory(size)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def blocking_event_fd(full: bool) -> int:
    """An eventfd on which a reader waits, or a writer if it is full."""
    fd = os.eventfd(0)
    if full:
        os.write(fd, UNTIL_FULL)
    return fd


def _pipe(chance: random.Random) -> int:
    ends = os.pipe()
    keep = chance.randrange(2)
    os.close(ends[1 - keep])
    return ends[keep]


def _full_pipe() -> int:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PAGE)
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(PAGE))
    except BlockingIOError:
        os.set_blocking(writer, True)
    os.close(reader)
    return writer


def _epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


def _socket(chance: random.Random) -> int:
    near, far = socket.socketpair(socket.AF_UNIX, chance.choice((socket.SOCK_STREAM, socket.SOCK_SEQPACKET)))
    far.close()
    return near.detach()


def _file(chance: random.Random) -> int:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(chance.choice((0, 1, PAGE, 1 << 20)))
        return os.open(file.name, chance.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH)))


def strange(chance: random.Random) -> int:
    """A descriptor of some other kind."""
    kinds = (
        lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
        lambda: os.open("/dev/null", os.O_RDWR),
        lambda: os.open("/dev/zero", os.O_RDWR),
        lambda: os.open("/proc/self/status", os.O_RDONLY),
        _epoll,
        lambda: os.pidfd_open(os.getpid()),
        lambda: os.eventfd(chance.choice((0, 1)), os.EFD_SEMAPHORE),
        lambda: blocking_event_fd(full=True),
        lambda: blocking_event_fd(full=False),
        lambda: sealed(1 << 20, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW),
        lambda: memory(chance.choice((0, 1, PAGE - 1, PAGE, 1 << 40))),
        lambda: _pipe(chance),
        _full_pipe,
        lambda: _socket(chance),
        lambda: _file(chance),
    )
    return chance.choice(kinds)()


def torment(fd: int, size: int, chance: random.Random) -> str:
    """Does something to the memory file of a running guest. Returns what."""
    match chance.randrange(6):
        case 0:
            os.ftruncate(fd, 0)
            return "truncated"
        case 1:
            os.ftruncate(fd, chance.randrange(size))
            return "truncated in the middle"
        case 2:
            punch(fd, 0, size)
            return "all pages taken out"
        case 3:
            start = chance.randrange(size // PAGE) * PAGE
            punch(fd, start, PAGE * chance.randint(1, 64))
            return "pages taken out"
        case 4:
            os.ftruncate(fd, 0)
            time.sleep(chance.random() / 1000)
            os.ftruncate(fd, size)
            return "truncated and grown again"
        case _:
            try:
                fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
            except OSError:
                return "sealing failed"
            return "sealed"
