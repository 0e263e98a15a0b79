"""The demonstration with guests in this process: what it shows, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

from .running import PATIENCE, PROGRAM, plain, viaduct, wait_until


def test_report_for_programs(tmp_path: Path) -> None:
    done = viaduct("demo", "--seconds", "0.5", "--json", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["ping"]["sent"] == report["ping"]["received"]
    assert [stream["verified"] for stream in report["streams"]] == [True, True]
    carried = {port["name"]: sum(queue["frames"] for queue in port["queues"]) for port in report["statistics"]["ports"]}
    assert set(carried) == {"alice", "bob"}
    assert all(frames > report["ping"]["sent"] for frames in carried.values())
    assert list(tmp_path.iterdir()) == []


def test_lines_for_people(tmp_path: Path) -> None:
    done = viaduct("demo", "--seconds", "0.5", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for text in ("First ping answered", "200 of 200 answered", "TCP bob to alice", "every byte checked", "Try next"):
        assert text in done.stdout
    assert "RECEIVED/S" in done.stdout


def test_a_live_table_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([PROGRAM, "demo", "--seconds", "2"], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = ""
    try:
        while "Try next" not in shown:
            shown += os.read(ours, 4096).decode()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "received/s" in plain(shown)


def test_ended_in_the_middle_it_leaves_nothing(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            [PROGRAM, "demo", "--seconds", "600"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        ) as process:
            wait_until(lambda: [*tmp_path.rglob("*.sock")], "sockets")
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(number)
            assert process.wait(PATIENCE) in (1, 130)
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
        assert list(tmp_path.iterdir()) == []
