"""A machine's RAM: what of it others can see, and what a balloon can give back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from viaduct.vmm.errors import MachineError
from viaduct.vmm.memory_map import PAGE
from viaduct.vmm.ram import Ram

SIZE = 4 << 20


def test_shared_memory_is_a_file_that_shows_what_is_written() -> None:
    ram = Ram(SIZE, shared=True)
    ram.memory.write(PAGE, b"here")
    assert ram.fd is not None
    assert os.pread(ram.fd, 4, PAGE) == b"here"
    ram.close()


def test_memory_of_our_own_is_no_file() -> None:
    ram = Ram(SIZE, shared=False)
    assert ram.fd is None
    assert ram.memory.read(SIZE - PAGE, PAGE) == bytes(PAGE)
    (place,) = ram.memory.places
    assert place[2] % (2 << 20) == 0, "a huge page of the guest's can be one of the host's"


def test_what_is_given_back_of_our_own_memory_reads_as_zeroes() -> None:
    ram = Ram(SIZE, shared=False)
    ram.memory.write(0, b"\xaa" * 3 * PAGE)
    assert ram.memory.discard(PAGE, PAGE) == PAGE
    assert ram.memory.read(0, 3 * PAGE) == b"\xaa" * PAGE + bytes(PAGE) + b"\xaa" * PAGE


@pytest.mark.parametrize("shared", [False, True])
def test_memory_is_kept_and_comes_back(shared: bool, tmp_path: Path) -> None:
    ram = Ram(SIZE, shared=shared)
    ram.memory.write(SIZE - PAGE, b"kept")
    ram.save(tmp_path / "memory")
    again = Ram(SIZE, content=tmp_path / "memory", shared=shared)
    assert again.memory.read(SIZE - PAGE, 8) == b"kept\0\0\0\0"
    assert again.memory.read(0, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("shared", [False, True])
def test_more_than_the_host_has_is_refused(shared: bool) -> None:
    with pytest.raises(MachineError, match="ask for less"):
        Ram(1 << 50, shared=shared)
