"""`viaduct switch` as a process, and the commands that talk to it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from viaduct.guest import Guest
from viaduct.switch.control_client import ControlClient

from .running import PATIENCE, PROGRAM, daemon, plain, viaduct, wait_until


def test_ports_come_and_go(tmp_path: Path) -> None:
    first, second = tmp_path / "a.sock", tmp_path / "b.sock"
    with daemon(tmp_path, "--port", f"a=vhost-user:{first}", "--port", "hole=null") as switch:
        assert first.is_socket()
        assert switch.ask("port", "add", f"b=vhost-user:{second},queues=2,vlan=7").returncode == 0
        assert second.is_socket()
        ports = {port["name"]: port for port in json.loads(switch.ask("port", "list", "--json").stdout)}
        assert list(ports) == ["a", "hole", "b"]
        assert ports["b"]["config"] == f"vhost-user:{second},vlan=7,queues=2"
        assert ports["a"]["link"] == "down"
        assert switch.ask("port", "del", "a", "hole").returncode == 0
        assert not first.exists()
        lines = switch.ask("port", "list").stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["PORT", "b"]
        assert switch.stop() == 0
    assert not second.exists()
    assert not switch.control.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_removes_its_sockets(tmp_path: Path, number: signal.Signals) -> None:
    with daemon(tmp_path, "--port", f"a=vhost-user:{tmp_path}/a.sock") as switch:
        assert switch.stop(number) == 0
        assert "ended" in switch.output()
    assert [path.name for path in tmp_path.iterdir()] == ["switch.log"]


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    live, stale = tmp_path / "live.sock", tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.bind(str(live))
        somebody.listen()
        done = viaduct("switch", "--port", f"a=vhost-user:{live}", "--control", str(tmp_path / "control.sock"))
        assert done.returncode in (1, 2)
        assert str(live) in done.stderr
        assert "in use" in done.stderr
        assert live.is_socket()
    with daemon(tmp_path, "--port", f"a=vhost-user:{stale}") as switch:
        assert stale.is_socket()
        second = viaduct("switch", "--control", str(switch.control))
        assert second.returncode == 1
        assert "in use" in second.stderr
        assert switch.ask("stats").returncode == 0


@pytest.mark.parametrize(
    ("port", "problem"),
    [("a=vhost-user:{}/missing/a.sock", "does not exist"), ("a=pcap:{}/missing.pcap", "No such file")],
)
def test_a_port_that_cannot_be_had(tmp_path: Path, port: str, problem: str) -> None:
    done = viaduct("switch", "--port", port.format(tmp_path), "--control", str(tmp_path / "control.sock"))
    assert done.returncode in (1, 2)
    assert problem in done.stderr
    assert "ports.a" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "control.sock").exists()
    with daemon(tmp_path) as switch:
        done = switch.ask("port", "add", port.format(tmp_path))
        assert done.returncode in (1, 2)
        assert problem in done.stderr
        assert json.loads(switch.ask("port", "list", "--json").stdout) == []


def test_hang_up_reads_the_configuration_again(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text('[ports]\na = "vhost-user:a.sock"\nb = "null"\n')
    with daemon(tmp_path, "--config", str(file)) as switch:
        switch.ask("port", "add", "later=null")
        file.write_text('[ports]\na = "vhost-user:a.sock,vlan=7"\nc = "null"\n')
        switch.process.send_signal(signal.SIGHUP)
        switch.wait_for(" reloaded: ")
        ports = {port["name"]: port["config"] for port in json.loads(switch.ask("port", "list", "--json").stdout)}
        assert ports == {"a": f"vhost-user:{tmp_path}/a.sock,vlan=7", "c": "null", "later": "null"}

        file.write_text('[ports]\na = "vhost-user:a.sock,vlan=7"\nc = "nul"\n')
        switch.process.send_signal(signal.SIGHUP)
        switch.wait_for(" not-reloaded: ")
        assert f"{file}:3: ports.c.kind: unknown kind of port 'nul'; did you mean 'null'?" in switch.output()
        assert len(json.loads(switch.ask("port", "list", "--json").stdout)) == 3
        assert switch.stop() == 0


def test_ports_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    """File descriptors, mappings and threads of the switch are as many as before; guests that hang up included."""
    with daemon(tmp_path, "--port", "hole=null") as switch, ControlClient(switch.control) as client:
        process = Path(f"/proc/{switch.process.pid}")

        def held() -> tuple[int, int, int]:
            mappings = [line for line in (process / "maps").read_text().splitlines() if "memfd" in line]
            return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())), len(mappings)

        async def use(path: Path) -> None:
            async with Guest(path, ip="10.0.0.1/24"):
                pass

        def come_and_go() -> None:
            for name in ("a", "b"):
                path = tmp_path / f"{name}.sock"
                client.call("port.add", name=name, port={"kind": "vhost-user", "path": str(path), "queues": 2})
                asyncio.run(use(path))
            client.call("port.add", name="r", port={"kind": "pcap", "out": str(tmp_path / "r.pcap")})
            for name in ("a", "b", "r"):
                client.call("port.del", name=name)

        come_and_go()
        before = held()
        for _ in range(10):
            come_and_go()
        wait_until(lambda: held() <= before, f"as few as before, {before}")
        assert held() == before


def test_events_are_followed(tmp_path: Path) -> None:
    with daemon(tmp_path, "--port", "a=null") as switch:
        following = subprocess.Popen(
            [PROGRAM, "events", "--follow", "--json", "--control", str(switch.control)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert following.stdout is not None
        with following, following.stdout:
            while (kind := json.loads(following.stdout.readline())["kind"]) != "port-added":
                assert kind.startswith("sandbox")
            switch.ask("port", "del", "a")
            event = json.loads(following.stdout.readline())
            assert (event["kind"], event["port"]) == ("port-removed", "a")
            assert switch.stop() == 0
            assert following.wait(PATIENCE) == 0


def test_statistics_are_watched(tmp_path: Path) -> None:
    with daemon(tmp_path, "--port", "a=null") as switch:
        words = [PROGRAM, "stats", "--watch", "--json", "--interval", "0.1", "--control", str(switch.control)]
        watching = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert watching.stdout is not None
        with watching, watching.stdout:
            times = [json.loads(watching.stdout.readline())["time"] for _ in range(3)]
            assert times == sorted(set(times))
            watching.send_signal(signal.SIGINT)
            assert watching.wait(PATIENCE) == 130
            assert watching.stderr is not None
            assert "Traceback" not in watching.stderr.read()


def test_rates_of_ports_and_pollers_are_watched(tmp_path: Path) -> None:
    with daemon(tmp_path, "--port", "a=null") as switch:
        words = [PROGRAM, "stats", "--watch", "--interval", "0.1", "--control", str(switch.control)]
        watching = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert watching.stdout is not None
        with watching, watching.stdout:
            lines = [watching.stdout.readline().split() for _ in range(8)]
            watching.send_signal(signal.SIGINT)
        assert [line[0] for line in lines] == ["PORT", "a", "POLLER", "0"] * 2
        assert lines[3][1:4] == ["any", "0", "0"]


def test_a_capture_is_not_written_to_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with daemon(tmp_path, "--port", "a=null") as switch:
        words = [PROGRAM, "capture", "a", "--control", str(switch.control)]
        done = subprocess.run(words, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2
    assert "viaduct capture a -w - |" in done.stderr


def test_a_capture_ends_with_an_interrupt(tmp_path: Path) -> None:
    file = tmp_path / "a.pcapng"
    with daemon(tmp_path, "--port", "a=null") as switch:
        words = [PROGRAM, "capture", "a", "-w", str(file), "--control", str(switch.control)]
        capturing = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        with capturing:
            wait_until(lambda: file.exists() and file.stat().st_size > 0, "the header is written")
            capturing.send_signal(signal.SIGINT)
            assert capturing.wait(PATIENCE) == 0
        done = switch.ask("capture", "b", "-w", str(file))
        assert done.returncode == 2
        assert "unknown port 'b'" in done.stderr


def test_a_live_table_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(
        [PROGRAM, "switch", "--port", "hole=null", "--control", str(tmp_path / "control.sock")],
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    try:
        while b"Ctrl-C ends the switch" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    text = plain(shown.decode())
    assert "received/s" in text
    assert "batches by size" in text
    assert "hole" in text
    assert "ready" in text
