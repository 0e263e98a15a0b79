"""A front-end that truncates its file under us, in a process that runs Python: the interpreter's own fault handler and
the guard live side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from viaduct._core import GuestMemory

SIZE = 1 << 20

HEAD = """
import faulthandler, mmap, os, resource
from viaduct._core import GuestMemory

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def shared(size):
    fd = os.memfd_create("viaduct-test")
    os.ftruncate(fd, size)
    return fd
"""

FOREIGN_FAULT = """
fd = shared(4096)
elsewhere = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
elsewhere[0]
"""

BEFORE = """
faulthandler.enable()
memory = GuestMemory().with_region(0, 4096, 0, 0, shared(4096))
"""

AFTER = """
memory = GuestMemory().with_region(0, 4096, 0, 0, shared(4096))
faulthandler.enable()
another = GuestMemory().with_region(0, 4096, 0, 0, shared(4096))
"""

OWN_FAULT = """
fd = shared(8192)
memory = GuestMemory().with_region(0, 8192, 0, 0, fd)
os.ftruncate(fd, 0)
assert memory.read(4096, 4) == bytes(4) and memory.faulted
print("went on")
"""


@pytest.fixture
def file() -> int:
    fd = os.memfd_create("viaduct-test")
    os.ftruncate(fd, SIZE)
    return fd


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", HEAD + program], capture_output=True, text=True, timeout=60, check=False
    )


def test_truncated_memory_reads_as_zeroes_and_says_so(file: int) -> None:
    memory = GuestMemory().with_region(0, SIZE, 1 << 40, 0, file)
    memory.write(0x8000, b"guest")
    os.ftruncate(file, 0x1000)
    os.close(file)
    assert not memory.faulted
    assert memory.read(0x8000, 5) == bytes(5)
    assert memory.faulted


def test_truncation_of_one_memory_leaves_the_others_alone(file: int) -> None:
    other = os.memfd_create("viaduct-test")
    os.ftruncate(other, SIZE)
    victim, bystander = (GuestMemory().with_region(0, SIZE, 0, 0, fd) for fd in (file, other))
    bystander.write(0, b"still here")
    os.ftruncate(file, 0)
    victim.write(0x4000, b"nowhere")
    assert victim.faulted
    assert not bystander.faulted
    assert bystander.read(0, 10) == b"still here"
    os.close(file)
    os.close(other)


@pytest.mark.parametrize("order", [BEFORE, AFTER], ids=["faulthandler-first", "guard-first"])
def test_own_fault_does_not_reach_pythons_handler(order: str) -> None:
    done = run(order + OWN_FAULT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize("order", [BEFORE, AFTER], ids=["faulthandler-first", "guard-first"])
def test_foreign_fault_gets_pythons_traceback_once(order: str) -> None:
    done = run(order + FOREIGN_FAULT)
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == 1


def test_foreign_fault_without_another_handler_ends_the_process() -> None:
    done = run("memory = GuestMemory().with_region(0, 4096, 0, 0, shared(4096))\n" + FOREIGN_FAULT)
    assert done.returncode == -signal.SIGBUS
    assert done.stderr == ""
