"""A whole switch in the sandbox: by default, strictly, and as an ordinary user."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from viaduct.guest import Guest

from .running import Daemon, daemon, viaduct


def status_of_threads(switch: Daemon, key: str) -> set[str]:
    """One line of /proc/PID/status for all threads."""
    found = set()
    for task in Path(f"/proc/{switch.process.pid}/task").iterdir():
        lines = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        found.add(lines[key])
    return found


def test_all_threads_are_in_it_by_default(tmp_path: Path) -> None:
    with daemon(tmp_path, "--port", "a=null") as switch:
        assert status_of_threads(switch, "Seccomp") == {"2"}
        assert status_of_threads(switch, "NoNewPrivs") == {"1"}
        (effective,) = status_of_threads(switch, "CapEff")
        allowed = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 12  # CHOWN, DAC_OVERRIDE, FOWNER, NET_ADMIN
        assert int(effective, 16) & ~allowed == 0
        assert status_of_threads(switch, "CapAmb") == {"0" * 16}
        assert "sandbox: auto: gave up all capabilities" in switch.output()
        told = json.loads(switch.ask("status", "--json").stdout)["sandbox"]
        assert told["mode"] == "auto"
        assert "system calls that no switch makes" in told["given_up"]


def test_ports_that_come_later_work(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    with daemon(tmp_path) as switch:
        elsewhere.mkdir()
        for port in (f"a=vhost-user:{elsewhere}/a.sock,mode=0660", f"b=pcap:,out={elsewhere}/b.pcap"):
            done = switch.ask("port", "add", port)
            assert done.returncode == 0, done.stderr
        assert (elsewhere / "a.sock").is_socket()
        assert (elsewhere / "b.pcap").exists()
        assert switch.ask("port", "del", "a", "b").returncode == 0
        assert switch.stop() == 0
        assert "syscall-refused" not in switch.output()


async def test_frames_pass_in_the_strictest(tmp_path: Path) -> None:
    words = ("--sandbox", "strict")
    with daemon(
        tmp_path, *words, "-p", f"a=vhost-user:{tmp_path}/a.sock", "-p", f"b=vhost-user:{tmp_path}/b.sock"
    ) as it:
        async with (
            Guest(f"{tmp_path}/a.sock", ip="10.0.0.1/24") as alice,
            Guest(f"{tmp_path}/b.sock", ip="10.0.0.2/24"),
        ):
            result = await alice.ping("10.0.0.2", count=3)
            assert result.received == 3
        assert it.stop() == 0
        assert "syscall-refused" not in it.output()


def test_strict_refuses_what_was_not_named_and_says_what_to_do(tmp_path: Path) -> None:
    elsewhere, named = tmp_path / "elsewhere", tmp_path / "named"
    inside = tmp_path / "inside"
    for directory in (elsewhere, named, inside):
        directory.mkdir()
    with daemon(inside, "--sandbox", "strict", "--sandbox-path", str(named)) as switch:
        assert switch.ask("port", "add", f"a=vhost-user:{named}/a.sock").returncode == 0
        done = switch.ask("port", "add", f"b=vhost-user:{elsewhere}/b.sock")
        assert done.returncode in (1, 2)
        assert f"does not let it write to {elsewhere}/b.sock: start it with --sandbox-path DIRECTORY" in done.stderr


def test_off_means_off(tmp_path: Path) -> None:
    with daemon(tmp_path, "--sandbox", "off") as switch:
        assert status_of_threads(switch, "Seccomp") == {"0"}
        assert json.loads(switch.ask("status", "--json").stdout)["sandbox"]["mode"] == "off"


def test_status_for_people(tmp_path: Path) -> None:
    with daemon(tmp_path, "--port", "a=null") as switch:
        text = switch.ask("status").stdout
        assert f"pid {switch.process.pid}" in text
        assert "sandbox" in text
        assert "1 port" in text
    assert viaduct("status", "--control", str(switch.control)).returncode == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user runs all tests as one anyway")
def test_as_root_taps_can_be_added_later_unless_strict(tmp_path: Path) -> None:
    name = f"sb{os.getpid() % 1_000_000}"
    with daemon(tmp_path) as switch:
        done = switch.ask("port", "add", f"t=tap:{name}")
        assert done.returncode == 0, done.stderr
        assert switch.ask("port", "del", "t").returncode == 0
    (tmp_path / "strict").mkdir()
    with daemon(tmp_path / "strict", "--sandbox", "strict") as switch:
        done = switch.ask("port", "add", f"t=tap:{name}")
        assert done.returncode in (1, 2)
        assert "the switch runs in a sandbox (strict) that took CAP_NET_ADMIN away" in done.stderr
