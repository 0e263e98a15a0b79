"""`viaduct run`, `up` and `vm` as processes: what they say at the end, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from viaduct.cli import up

from .running import PATIENCE, PROGRAM, viaduct, wait_until

SPIN = b"\xeb\xfe"


def exits_with(code: int) -> bytes:
    """mov al, code; out 0xf4, al; hlt."""
    return b"\xb0" + bytes([code]) + b"\xe6\xf4\xf4"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and kernels of each test are its own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("spin.bin").write_bytes(SPIN)


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on until it is told otherwise."""
    process = subprocess.Popen(
        [PROGRAM, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.terminate()  # ... and what it has started.
        try:
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.communicate()


def machine(kernel: str, *words: str) -> tuple[str, ...]:
    return ("run", "--kernel", kernel, "--boot", "flat", "--memory", "4M", "--console", "none", *words)


def status(name: str) -> Any:
    """What `viaduct vm show` knows; None while there is no such machine."""
    done = viaduct("vm", "show", name, "--json")
    return json.loads(done.stdout) if done.returncode == 0 else None


def runs(name: str, state: str = "running") -> bool:
    return (found := status(name)) is not None and bool(found["state"] == state)


def test_the_exit_code_is_the_guests() -> None:
    Path("seven.bin").write_bytes(exits_with(7))
    assert viaduct(*machine("seven.bin")).returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_machine(number: signal.Signals) -> None:
    with running(*machine("spin.bin", "--name", "web")) as process:
        wait_until(lambda: runs("web"), "it runs")
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number
    assert os.listdir("viaduct/machines") == []


def test_a_signal_while_a_machine_is_being_built() -> None:
    """Its network's back-end has accepted the connection and says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("silent.sock")
        listener.listen()
        listener.settimeout(PATIENCE)
        with running(*machine("spin.bin", "--nic", "vhost-user:silent.sock")) as process:
            connection, _ = listener.accept()
            with connection:
                process.terminate()
                assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert os.listdir("viaduct/machines") == []


def test_a_snapshot_that_fails_leaves_the_machine_as_it_was() -> None:
    """Also one after which it should have ended."""
    Path("full").mkdir()
    Path("full", "something").touch()
    with running(*machine("spin.bin", "--name", "web")) as process:
        wait_until(lambda: runs("web"), "it runs")
        done = viaduct("vm", "snapshot", "web", "full", "--stop")
        assert done.returncode == 1
        assert "there is something in it" in done.stderr
        assert runs("web")
        assert viaduct("vm", "pause", "web").returncode == 0
        assert viaduct("vm", "snapshot", "web", "full", "--stop").returncode == 1
        assert runs("web", "paused")
        assert viaduct("vm", "snapshot", "web", "kept", "--stop").returncode == 0
        assert process.wait(PATIENCE) == 0
    assert sorted(os.listdir("kept")) == ["machine.json", "memory"]


def test_several_machines_have_the_highest_exit_code(tmp_path: Path) -> None:
    """And one that a signal has killed is named."""
    Path("seven.bin").write_bytes(exits_with(7))
    table = '[machines.{}]\nkernel = "{}.bin"\nboot = "flat"\nmemory = "4M"\n'
    Path("net.toml").write_text(table.format("web", "seven"))
    done = viaduct("up", "net.toml")
    assert done.returncode == 7, done.stdout
    Path("net.toml").write_text(table.format("web", "seven") + table.format("db", "spin"))
    with running("up", "net.toml") as process:
        wait_until(lambda: runs("db") or process.poll() is not None, "it runs")
        os.kill(status("db")["pid"], signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "db: killed by SIGKILL" in output


def test_nothing_is_left_of_a_killed_up() -> None:
    Path("net.toml").write_text('[machines.web]\nkernel = "spin.bin"\nboot = "flat"\nmemory = "4M"\n')
    with running("up", "net.toml") as process:
        wait_until(lambda: runs("web"), "it runs")
        process.kill()
        process.wait()
        wait_until(lambda: os.listdir("viaduct/machines") == [], "its machine has ended")
        wait_until(lambda: not Path("viaduct/control.sock").exists(), "its switch has ended")


def test_a_switch_runs_already() -> None:
    """Whose socket that is is said, and nothing is touched."""
    Path("net.toml").write_text('[machines.web]\nkernel = "spin.bin"\nboot = "flat"\nmemory = "4M"\n')
    with running("up", "net.toml"):
        wait_until(lambda: runs("web"), "it runs")
        done = viaduct("up", "net.toml")
        assert done.returncode == 1
        assert "switch: viaduct:" in done.stdout
        assert "control.sock" in done.stdout
        assert runs("web")


async def test_long_lines_of_a_machine_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(up, "_VIADUCT", (sys.executable, "-c"))
    child = await up._Child.start("web", "print('begin'); print('x' * 1000000); print('end', end='')")
    await child.process.wait()
    await child.end()
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("web: begin", "web: end")
    assert sum(line.count("x") for line in lines) == 1000000
    assert all(line.startswith("web: ") for line in lines)
