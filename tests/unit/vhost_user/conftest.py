"""A back-end with a recording device, front-ends to speak to it, and the count of what they may leave behind:
nothing."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import Guest
from viaduct.vhost_user import Backend


def _resources() -> dict[str, object]:
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # The descriptor of the listing itself.
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line]
    return {"descriptors": descriptors, "maps of guest memory": maps, "threads": len(os.listdir("/proc/self/task"))}


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """File descriptors, mappings and threads are the same before and after each test."""
    gc.collect()  # What a test before this one left to the collector is not this one's.
    before = _resources()
    yield
    if _resources() != before:
        gc.collect()  # What only a cycle holds is no leak.
    assert _resources() == before


@pytest.fixture
def socket_dir(leaves_nothing: None) -> Iterator[Path]:
    """A directory with a short name: socket paths are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vu") as directory:
        yield Path(directory)


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


@pytest.fixture
async def backend(device: RecordingDevice, socket_dir: Path) -> AsyncIterator[Backend]:
    async with Backend(device, str(socket_dir / "port.sock"), name="vm1") as backend:
        yield backend


@pytest.fixture
async def wire(backend: Backend) -> AsyncIterator[Guest]:
    """Connected, nothing said yet."""
    guest = Guest(backend.path)
    yield guest
    guest.close()


@pytest.fixture
async def negotiated(wire: Guest) -> Guest:
    """Features and protocol features are acknowledged."""
    await wire.negotiate()
    return wire


@pytest.fixture
async def ready(negotiated: Guest) -> Guest:
    """Memory is shared too."""
    await negotiated.share()
    return negotiated
