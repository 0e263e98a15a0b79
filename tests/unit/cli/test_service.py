"""A switch as systemd runs it: it says how it is and takes its sockets; and who may use the control socket."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from viaduct.switch.control_access import READING, ControlAccess, why_refused
from viaduct.switch.control_client import ControlClient
from viaduct.switch.control_wire import ControlError

from .running import PATIENCE, PROGRAM, daemon, viaduct, wait_until

CONTRIB = Path(__file__).parents[3] / "contrib"


@contextmanager
def service_manager(path: str) -> Iterator[Callable[[str], None]]:
    """Plays systemd's end of sd_notify; gives a function that waits until a line was said."""
    said: list[str] = []

    def listen(notify: socket.socket) -> None:
        while (text := notify.recv(4096)) != b"end":
            said.extend(text.decode().splitlines())

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        listening = threading.Thread(target=listen, args=(notify,))
        listening.start()
        try:
            yield lambda line: wait_until(lambda: line in said, f"{line} is said")
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ending:
                ending.sendto(b"end", path)
            listening.join()


@pytest.mark.parametrize("abstract", [False, True])
def test_it_says_when_it_is_ready_how_it_is_and_that_it_ends(tmp_path: Path, abstract: bool) -> None:
    address = f"@viaduct-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with service_manager("\0" + address[1:] if abstract else address) as said:
        environment = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}
        words = [PROGRAM, "switch", "-p", "a=null", "--control", str(tmp_path / "control.sock")]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment) as process:
            try:
                said("READY=1")
                said("STATUS=1 ports, 1 up")
                assert viaduct("port", "add", f"b=vhost-user:{tmp_path}/b.sock", "--control", words[-1]).returncode == 0
                said("STATUS=2 ports, 1 up")
                said("WATCHDOG=1")
                process.terminate()
                said("STOPPING=1")
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()


def test_it_takes_the_sockets_that_systemd_made(tmp_path: Path) -> None:
    control, port = tmp_path / "c.sock", tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for sock, path in ((first, port), (second, control)):
            sock.bind(str(path))
            sock.listen()
        inodes = {path: path.stat().st_ino for path in (control, port)}
        # systemd gives them as descriptors 3 and 4 (sd_listen_fds(3)), and LISTEN_PID of the process that it executes.
        script = (
            f"exec 3<&{first.fileno()} 4<&{second.fileno()}; "
            f'export LISTEN_PID=$$; exec "$0" switch -p a=vhost-user:{port}'
        )
        environment = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "ports:control"}
        with subprocess.Popen(
            ["bash", "-c", script, PROGRAM],
            stdout=subprocess.DEVNULL,
            env=environment,
            pass_fds=(first.fileno(), second.fileno()),
        ) as process:
            try:
                first.close()
                second.close()
                ports = json.loads(viaduct("port", "list", "--json", "--control", str(control)).stdout)
                assert [each["name"] for each in ports] == ["a"]
                with socket.socket(socket.AF_UNIX) as guest:
                    guest.connect(str(port))
                    with ControlClient(control) as client:
                        wait_until(lambda: client.call("port.list")[0]["peer"], "the port's socket is served")
                process.terminate()
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()
        assert {path: path.stat().st_ino for path in (control, port)} == inodes, "systemd's files stay"


def test_sockets_for_another_process_are_not_taken(tmp_path: Path) -> None:
    done = viaduct("status", "--control", str(tmp_path / "c.sock"), LISTEN_PID="1", LISTEN_FDS="1")
    assert done.returncode == 3


@pytest.mark.parametrize("unit", ["viaduct.service", "viaduct.socket"])
def test_units_say_nothing_that_does_not_exist(unit: str) -> None:
    text = (CONTRIB / unit).read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "["))]
    assert all("=" in line for line in lines)
    for line in lines:
        if line.startswith("Exec"):
            words = line.split("=", 1)[1].split()[1:]
            done = viaduct(words[0], "--help")
            assert done.returncode == 0
            assert all(word in done.stdout for word in words if word.startswith("--"))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that others may enter. Those of pytest are closed, again by each run that starts."""
    made = Path(tempfile.mkdtemp(prefix="viaduct-open-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def as_nobody(group: int, work: Callable[[], Any]) -> Any:
    """What `work` returns (or the error's text) in a child that is nobody, with this group besides."""
    user = pwd.getpwnam("nobody")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([group])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            try:
                answer = work()
            except ControlError as error:
                answer = f"{error.code}: {error}"
            os.write(writing, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others")
def test_groups_may_read_or_change(open_directory: Path) -> None:
    changers, readers, strangers = 54001, 54002, 54003
    words = ("--control-group", str(changers), "--control-readers", str(readers), "-p", "a=null")
    with daemon(open_directory, *words) as switch:
        path = switch.control

        def list_ports() -> list[str]:
            with ControlClient(path) as client:
                return [port["name"] for port in client.call("port.list")]

        def remove() -> None:
            with ControlClient(path) as client:
                client.call("port.del", name="a")

        def capture() -> None:
            with ControlClient(path) as client:
                next(client.bytes("capture", port="a"))

        assert as_nobody(readers, list_ports) == ["a"]
        assert as_nobody(readers, remove).startswith("denied: pid ")
        assert "may read but not capture" in as_nobody(readers, capture)
        assert "may not ask this switch" in as_nobody(strangers, list_ports)
        assert as_nobody(changers, list_ports) == ["a"]
        assert as_nobody(changers, remove) is None
        assert list_ports() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others")
def test_without_groups_others_are_told_that_they_may_not(open_directory: Path) -> None:
    with daemon(open_directory) as switch:
        assert stat.S_IMODE(switch.control.stat().st_mode) == 0o600
        said = as_nobody(54001, lambda: ControlClient(switch.control).call("stats"))
        assert f"does not let this user (uid {pwd.getpwnam('nobody').pw_uid}) connect" in said
        assert "--control-group" in said


def test_one_group_is_the_groups_file() -> None:
    assert ControlAccess().file.mode == 0o600
    assert (ControlAccess(readers=7).file.mode, ControlAccess(readers=7).file.gid) == (0o660, 7)
    assert ControlAccess(readers=7, changers=7).file.gid == 7
    assert ControlAccess(readers=7, changers=8).file.mode == 0o666


def test_what_readers_may_ask() -> None:
    for method in ("port.add", "port.del", "apply", "shutdown", "capture", "trace", "hand-over", "nonsense"):
        assert why_refused("read", method, "pid 1") is not None
        assert why_refused("change", method, "pid 1") is None
    for method in READING:
        assert why_refused("read", method, "pid 1") is None
        assert why_refused(None, method, "pid 1") is not None


def test_a_group_that_does_not_exist(tmp_path: Path) -> None:
    done = viaduct("switch", "--control", str(tmp_path / "c.sock"), "--control-group", "nobody-at-all")
    assert done.returncode == 2
    assert "--control-group: this host has no group 'nobody-at-all'" in done.stderr
