"""`viaduct device`: a user's class is found, served and ended, and what is wrong with it is said in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from viaduct.vhost_user import FrontEnd
from viaduct.virtio import DeviceType

from .running import PATIENCE, PROGRAM, viaduct, wait_until

RNG = str(Path(__file__).parents[3] / "examples" / "rng.py")
OWN = """
from viaduct.vhost_user import Device

class Size(Device):
    def __init__(self, room: str = "0") -> None:
        self.room = int(room)

class Other:
    pass

class Registers:
    def read(self, offset, size):
        return 0
    def write(self, offset, data):
        pass
"""


@contextmanager
def serving(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running `viaduct device`, whose lines go to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen([PROGRAM, "device", *words], stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_a_class_is_served_until_it_is_told_to_end(tmp_path: Path) -> None:
    socket, log = tmp_path / "rng.sock", tmp_path / "log"
    with serving(log, f"{RNG}:Rng", "--socket", str(socket)) as process:
        wait_until(lambda: socket.exists() or process.poll() is not None, "it listens")
        async with FrontEnd(str(socket), queue_count=1, device_id=DeviceType.ENTROPY):
            pass
        wait_until(lambda: "disconnected" in log.read_text(), "it tells that the front-end has gone")
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert f"Rng: listening on {socket}" in log.read_text()
    assert not socket.exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([f"{RNG}:Wrong"], "its devices are Rng"),
        (["nowhere.py:Rng"], "there is no file"),
        (["viaduct.nowhere:Rng"], "cannot be loaded"),
        (["OWN:Other"], "neither a subclass of viaduct.vhost_user.Device, nor a class with read"),
        (["OWN:Registers"], "viaduct run --device"),
        (["OWN:Size", "-o", "room=x"], "could not be made: ValueError"),
        (["OWN:Size", "-o", "space=1"], "could not be made: TypeError"),
        (["OWN:"], "names no class"),
    ],
)
def test_what_cannot_be_served(tmp_path: Path, words: list[str], complaint: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    words = [word.replace("OWN", str(tmp_path / "own.py")) for word in words]
    done = viaduct("device", *words, "--socket", str(tmp_path / "socket"))
    assert done.returncode == 1
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_option_has_a_name(tmp_path: Path) -> None:
    done = viaduct("device", f"{RNG}:Rng", "--socket", str(tmp_path / "socket"), "-o", "room")
    assert done.returncode == 2
    assert "NAME=VALUE" in done.stderr
