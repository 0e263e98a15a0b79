"""A switch as an ordinary user without any capability: sockets in a directory of its own, packets, and a clean end."""

from __future__ import annotations

import asyncio
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import viaduct as package
from viaduct.guest import Guest
from viaduct.switch.control_client import ControlClient

from .running import PATIENCE, PROGRAM, wait_until

USER = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of that user, where a socket's path is short enough."""
    made = Path(tempfile.mkdtemp(prefix="viaduct-user-"))
    os.chown(made, USER.pw_uid, USER.pw_gid)
    yield made
    shutil.rmtree(made)


def command(directory: Path, words: list[str]) -> list[str]:
    """How to run a command as that user. Root's Python may be where others cannot go: a mount namespace shows it."""
    if os.geteuid() != 0:
        return words
    needed = sorted({sys.prefix, sys.base_prefix, str(Path(package.__file__).parents[1])})
    hidden = sorted({f"/{Path(path).parts[1]}" for path in needed if not others_may_enter(Path(path))})
    lines = ["set -e"]
    places = []
    for index, path in enumerate(needed):
        place = shlex.quote(f"{directory}/see{index}")
        lines.append(f"mkdir {place}; mount --bind {shlex.quote(path)} {place}")
        places.append((place, shlex.quote(path)))
    for top in hidden:
        lines.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(top)}")
    for place, path in places:
        if any(path.startswith(f"{top}/") for top in hidden):
            lines.append(f"mkdir -p {path}; mount --bind {place} {path}")
    drop = "exec setpriv --reuid {} --regid {} --clear-groups --inh-caps=-all --bounding-set=-all"
    lines.append(f"{drop.format(USER.pw_uid, USER.pw_gid)} {shlex.join(words)}")
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines)]


def others_may_enter(path: Path) -> bool:
    return all(each.stat().st_mode & 0o001 for each in (path, *path.parents))


async def ping(directory: Path) -> int:
    """How many echo requests come back over the switch."""
    async with (
        Guest(f"{directory}/a.sock", ip="10.0.0.1/24") as alice,
        Guest(f"{directory}/b.sock", ip="10.0.0.2/24"),
    ):
        return (await alice.ping("10.0.0.2", count=3, wait=30)).received


def test_packets_pass_for_a_user_who_may_do_nothing_else(directory: Path) -> None:
    control = directory / "control.sock"
    words = [PROGRAM, "switch", "--control", str(control)]
    for name in ("a", "b"):
        words += ["--port", f"{name}=vhost-user:{directory}/{name}.sock"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    log = directory / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command(directory, words), stdout=output, stderr=subprocess.STDOUT, env=environment, cwd="/"
        ) as process,
    ):
        try:
            wait_until(lambda: " ready: " in log.read_text() or process.poll() is not None, "the switch is ready")
            assert process.poll() is None, log.read_text()
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert fields["Uid"].split() == [str(USER.pw_uid)] * 4
            assert {fields[key] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
            assert (fields["Seccomp"], fields["NoNewPrivs"]) == ("2", "1")
            assert (directory / "a.sock").stat().st_uid == USER.pw_uid
            assert asyncio.run(ping(directory)) == 3
            with ControlClient(control) as client:
                client.call("port.add", name="c", port={"kind": "pcap", "out": f"{directory}/c.pcap"})
                wait_until(
                    lambda: [port["link"] for port in client.call("port.list")] == ["down", "down", "up"],
                    "the guests have left and the recording runs",
                )
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    left = {path.name for path in directory.iterdir() if not path.name.startswith("see")}
    assert left == {"log", "c.pcap"}
    assert "syscall-refused" not in log.read_text()
