"""Descriptors that a front-end fills and makes block stop nobody."""

from __future__ import annotations

import os
import struct

from viaduct.vhost_user.event_fd import check_event_fd, drain, signal

FULL = struct.pack("=Q", (1 << 64) - 2)


def test_a_full_eventfd_that_blocks() -> None:
    fd = os.eventfd(0)
    check_event_fd(fd)
    os.write(fd, FULL)
    os.set_blocking(fd, True)
    signal(fd)
    assert os.eventfd_read(fd) >= (1 << 64) - 2
    signal(fd)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_an_empty_eventfd_that_blocks() -> None:
    fd = os.eventfd(0)
    check_event_fd(fd)
    os.set_blocking(fd, True)
    assert drain(fd)
    os.eventfd_write(fd, 3)
    assert drain(fd)
    assert drain(fd)
    os.close(fd)


def test_a_pipe_that_blocks() -> None:
    reader, writer = os.pipe()
    for end in (reader, writer):
        check_event_fd(end)
        os.set_blocking(end, True)
    assert drain(reader)
    for _ in range(1 << 15):
        signal(writer)
    for _ in range(1 << 15):
        assert drain(reader)
    os.close(writer)
    assert not drain(reader)
    os.close(reader)


def test_a_child_process_signals_as_well() -> None:
    fd = os.eventfd(0)
    signal(fd)
    child = os.fork()
    if child == 0:
        try:
            signal(fd)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.eventfd_read(fd) == 2
    os.close(fd)
