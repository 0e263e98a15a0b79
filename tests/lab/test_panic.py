"""The end of a guest's kernel is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.guest import viaduct_guest

pytestmark = pytest.mark.lab


def test_panic_is_told(tmp_path: Path) -> None:
    """The stock driver for pvpanic tells of the end of its kernel, and the machine says so."""
    with viaduct_guest("panic", tmp_path, "--on-reset", "stop") as guest:
        guest.send("echo c >/proc/sysrq-trigger")
        assert guest.ended() != 0
        assert guest.process is not None
        assert "panic" in guest.process.output()
