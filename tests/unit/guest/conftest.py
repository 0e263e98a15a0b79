"""A switch with two ports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import viaduct


@pytest.fixture
async def sockets(tmp_path: Path) -> AsyncIterator[tuple[Path, Path]]:
    """The sockets of two ports of one switch."""
    paths = (tmp_path / "a.sock", tmp_path / "b.sock")
    async with viaduct.Switch() as switch:
        for path in paths:
            await switch.add_port(path.stem, f"vhost-user:{path}")
        yield paths
