"""What an operator sees of a switch in trouble: events, structured logs, the metrics endpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from .running import PROGRAM, daemon, viaduct, wait_until


def test_history_ends_by_itself_and_can_be_narrowed(tmp_path: Path) -> None:
    with daemon(tmp_path, "--port", "a=null", "--port", "b=null") as switch:
        lines = [line for line in switch.ask("events").stdout.splitlines() if " sandbox" not in line]
        assert [line.split()[1:3] for line in lines] == [["a", "port-added:"], ["b", "port-added:"]]
        events = [json.loads(line) for line in switch.ask("events", "--json", "--port", "b").stdout.splitlines()]
        assert [(event["kind"], event["level"]) for event in events] == [("port-added", "info")]
        assert switch.ask("events", "--since", "1h").stdout == switch.ask("events").stdout
        assert switch.ask("events", "--since", "2999-01-01").stdout == ""
        done = switch.ask("events", "--since", "yesterday")
        assert done.returncode == 2
        assert "neither a time ago" in done.stderr


def test_a_refused_front_end_is_in_the_events_with_its_pid_and_uid(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with daemon(tmp_path, "--port", f"a=vhost-user:{path}") as switch:
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            first.connect(str(path))
            switch.wait_for("peer-connected")
            second.connect(str(path))
            assert second.recv(1) == b""
        wait_until(lambda: "peer-disconnected" in switch.ask("events").stdout, "the first one left")
        kinds = [json.loads(line)["kind"] for line in switch.ask("events", "--json", "--port", "a").stdout.splitlines()]
        assert kinds == ["port-added", "peer-connected", "peer-refused", "peer-disconnected"]
        assert f"pid {os.getpid()}, uid {os.geteuid()}" in switch.output()
        assert switch.output().count("refused a second front-end") == 1, "the logger's line is not shown as well"


def test_a_broken_request_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with daemon(tmp_path, "--port", f"a=vhost-user:{path}", "--log-format", "json") as switch:
        with socket.socket(socket.AF_UNIX) as somebody:
            somebody.connect(str(path))
            somebody.sendall(b"GET / HTTP/1.1\r\n\r\n")
            switch.wait_for("peer-disconnected")
        lines = [json.loads(line) for line in switch.output().splitlines()]
        (refused,) = [line for line in lines if line["kind"] == "request-refused"]
        assert refused["port"] == "a"
        assert refused["level"] == "warning"
        assert f"peer pid {os.getpid()}" in refused["message"]
        assert [line["kind"] for line in lines if not line["kind"].startswith("sandbox")] == [
            "port-added",
            "ready",
            "peer-connected",
            "request-refused",
            "peer-disconnected",
        ]


def test_metrics_are_served(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with daemon(tmp_path, "--port", "a=null", "--metrics", f"unix:{path}") as switch:
        with socket.socket(socket.AF_UNIX) as scraper:
            scraper.connect(str(path))
            scraper.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            answer = b"".join(iter(lambda: scraper.recv(65536), b""))
        assert b'viaduct_port_up{kind="null",port="a"} 1.0' in answer
        assert switch.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--metrics", "0.0.0.0:9100"], "public:0.0.0.0:9100"),
        (["--metrics", "unix:/nowhere/at/all.sock"], "does not exist"),
        (["--log-format", "xml"], "'text', 'json'"),
    ],
)
def test_impossible_options_end_it_at_once(tmp_path: Path, words: list[str], problem: str) -> None:
    done = viaduct("switch", "--control", str(tmp_path / "control.sock"), *words)
    assert done.returncode in (1, 2)
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_explains_and_its_exit_code_tells(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with daemon(tmp_path, "--port", f"a=vhost-user:{path}", "--port", "hole=null", "--port", "b=null") as switch:
        done = switch.ask("doctor", "a", "--seconds", "0.05")
        assert done.returncode == 1
        assert f"1. we listen on {path} and no front-end is connected since" in done.stdout
        assert "   What to do: start one: qemu-system-x86_64" in done.stdout
        found = json.loads(switch.ask("doctor", "a", "--seconds", "0.05", "--json").stdout)
        assert [finding["cause"] for finding in found["findings"]] == ["not-connected"]
        done = switch.ask("doctor", "hole", "--seconds", "0.05")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (
            0,
            "hole is healthy: nothing keeps packets from passing",
        )
        done = switch.ask("doctor", "c")
        assert done.returncode == 2
        assert "unknown port 'c'" in done.stderr


def test_a_trace_is_for_people_and_programs(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with daemon(tmp_path, "--port", f"a=vhost-user:{path}", "--port", "hole=null") as switch:
        done = switch.ask("trace", "hole")
        assert done.returncode == 2
        assert "a null port has no rings to look into" in done.stderr
        for words in ((), ("--json",)):
            tracing = subprocess.Popen(
                [PROGRAM, "trace", "a", "--count", "1", *words, "--control", str(switch.control)],
                stdout=subprocess.PIPE,
                text=True,
            )
            with tracing:
                while tracing.poll() is None:  # until the trace runs and sees what a new guest says first
                    viaduct("guest", "ping", "--connect", str(path), "--ip", "10.0.0.1/24", "10.0.0.2", "--count", "1")
                assert tracing.stdout is not None
                text = tracing.stdout.read()
            assert tracing.returncode == 0
            if words:
                packet = json.loads(text)
                assert packet["port"] == "a"
                assert packet["descriptors"][0]["address"] > 0
            else:
                assert " a received, queue 1, position " in text
                assert "    virtio-net header: " in text
                assert "    descriptor " in text
                assert "    to every other port of its VLAN" in text
