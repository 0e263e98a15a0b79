"""The sandbox from inside: what is given up, what goes on, and what is said when something is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from viaduct.switch import sandbox
from viaduct.switch.config import SwitchConfig, build_config
from viaduct.switch.sandbox import Sandbox, SandboxError


def inside(program: str, mode: str = "auto", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a sandbox of its own; `import json, os, sys` and `sandbox` are there."""
    start = (
        "import json, os, sys\n"
        "from viaduct.switch import sandbox\n"
        "from viaduct.switch.config import SwitchConfig\n"
        "fd = os.eventfd(0, os.EFD_NONBLOCK)\n"
        "named = json.loads(os.environ.get('NAMED', '[]'))\n"
        f"entered = sandbox.enter({mode!r}, SwitchConfig(), fd, directories=named)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_a_refused_system_call_fails_and_is_told_once() -> None:
    done = inside("""
import ctypes, select
from viaduct._core import refused_system_calls
libc = ctypes.CDLL(None, use_errno=True)
assert not select.select([fd], [], [], 0)[0]
for _ in range(3):
    assert libc.unshare(0) == -1
    assert ctypes.get_errno() == 38, ctypes.get_errno()  # ENOSYS
assert select.select([fd], [], [], 0)[0]
assert refused_system_calls() == [("unshare", 3)], refused_system_calls()
try:
    __import__("socket").socket(40)  # AF_VSOCK
except OSError as error:
    assert error.errno == 38
print("goes on")
""")
    assert done.stdout == "goes on\n", done.stderr
    assert done.stderr.count("the sandbox refused system call") == 2
    assert "(unshare), which failed with ENOSYS; if you need what it was for, start with --sandbox off" in done.stderr
    assert "(socket), which" in done.stderr


def test_what_a_switch_does_goes_on() -> None:
    """Threads, processes, sockets, timers, files, memory: nothing of it is refused."""
    done = inside("""
import asyncio, mmap, socket, subprocess, tempfile, threading, time
from viaduct._core import refused_system_calls

async def main():
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "socket")
        server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), path)
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.read() == b""
        writer.close()
        server.close()
        process = await asyncio.create_subprocess_exec("/bin/true")
        assert await process.wait() == 0
        await asyncio.to_thread(time.sleep, 0.001)
        with open(os.path.join(directory, "file"), "wb") as file:
            file.truncate(4096)
            os.posix_fallocate(file.fileno(), 0, 8192)

asyncio.run(main())
memory = os.memfd_create("memory")
os.ftruncate(memory, 4096)
mmap.mmap(memory, 4096).close()
thread = threading.Thread(target=time.sleep, args=(0.001,))
thread.start()
thread.join()
child = os.fork()
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
ours, theirs = socket.socketpair()
socket.send_fds(ours, [b"x"], [memory])
socket.recv_fds(theirs, 1, 1)
os.kill(os.getpid(), 0)
os.sched_setaffinity(0, os.sched_getaffinity(0))
time.strftime("%Z")
__import__("pwd").getpwuid(0)
socket.getaddrinfo("localhost", 80)
assert refused_system_calls() == [], refused_system_calls()
print("all done")
""")
    assert done.stdout == "all done\n", done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("path", ["/etc/viaduct-sandbox-test", "/usr/viaduct-sandbox-test"])
def test_the_systems_directories_are_not_written(path: str) -> None:
    done = inside(f"open({path!r}, 'w')")
    assert "PermissionError" in done.stderr
    assert not os.access(path, os.F_OK)


def test_what_can_be_written_cannot_be_executed(tmp_path: Path) -> None:
    done = inside(f"""
import shutil, subprocess
shutil.copy("/bin/true", {str(tmp_path / "true")!r})
subprocess.run([{str(tmp_path / "true")!r}])
""")
    assert "PermissionError" in done.stderr
    assert (tmp_path / "true").exists()


def test_tcp_is_closed() -> None:
    done = inside("""
import socket
for act in ("bind", "connect"):
    with socket.socket() as sock:
        try:
            getattr(sock, act)(("127.0.0.1", 1 if act == "connect" else 0))
        except OSError as error:
            print(type(error).__name__)
""")
    assert done.stdout.split() == ["PermissionError", "PermissionError"], done.stderr


def test_strict_leaves_only_what_is_named(tmp_path: Path) -> None:
    named, other = tmp_path / "named", tmp_path / "other"
    for directory in (named, other):
        directory.mkdir()
        (directory / "file").write_text("old")
    done = inside(
        f"""
open({str(named / "file")!r}, "w").write("new")
assert entered.can_write({str(named / "new")!r}) and not entered.can_write({str(other / "new")!r})
for path in {str(other / "file")!r}, {str(other)!r}:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path)
    except PermissionError:
        print("refused")
print(sandbox.active().capabilities)
""",
        "strict",
        NAMED=json.dumps([str(named)]),
    )
    assert done.stdout.split() == ["refused", "refused", "()"], done.stderr
    assert (named / "file").read_text() == "new"


def test_a_successor_starts_in_the_sandbox_and_knows() -> None:
    done = inside("""
import subprocess
program = '''
import os
from viaduct.switch import sandbox
from viaduct.switch.config import SwitchConfig
import ctypes
entered = sandbox.enter("auto", SwitchConfig(), os.eventfd(0))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0) == -1 and ctypes.get_errno() == 38
print(entered.mode, [line.split()[1] for line in open("/proc/self/status") if line.startswith("Seccomp_filters")])
'''
for _ in range(20):
    subprocess.run([sys.executable, "-c", program], check=True)
""")
    assert done.stdout.splitlines() == ["auto ['2']"] * 20, done.stderr


def test_who_only_says_that_it_inherited_did_not() -> None:
    told = Sandbox(mode="auto", given_up=("everything",))
    done = inside(
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('Seccomp:')])",
        VIADUCT_SANDBOX=json.dumps({"mode": told.mode, "given_up": told.given_up}),
    )
    assert done.stdout == "['2']\n", done.stderr


def test_off_gives_up_nothing() -> None:
    done = inside(
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('Seccomp:')])", "off"
    )
    assert done.stdout == "['0']\n", done.stderr


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has neither Landlock nor seccomp, and a process that gives nothing up."""

    def refused(*_: Any) -> None:
        raise OSError("the seccomp filter cannot be installed: Invalid argument (os error 22)")

    monkeypatch.setattr("viaduct._core.drop_capabilities", lambda keep: [])
    monkeypatch.setattr("viaduct._core.restrict_access", lambda *_: "not at all")
    monkeypatch.setattr("viaduct._core.filter_system_calls", refused)
    monkeypatch.setattr(sandbox, "_active", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.usefixtures("without")
def test_what_the_kernel_lacks_is_said() -> None:
    entered = sandbox.enter("auto", SwitchConfig(), -1)
    assert entered.given_up == ("all capabilities",)
    said = "; ".join(entered.not_given_up)
    assert "no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK, lsm=landlock)" in said
    assert "system calls: the seccomp filter cannot be installed" in said
    assert entered.can_write("/etc/anything")


@pytest.mark.usefixtures("without")
def test_strict_is_all_or_nothing() -> None:
    with pytest.raises(SandboxError, match=r"cannot be had: .*Landlock.*--sandbox auto does what it can"):
        sandbox.enter("strict", SwitchConfig(), -1)


def test_an_error_names_the_sandbox_only_if_it_is_to_blame(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (inner, outer, null) = build_config(
        {"ports": {"a": f"vhost-user:{tmp_path}/a.sock", "b": "vhost-user:/elsewhere/b.sock", "c": "null"}}
    ).ports.values()
    assert sandbox.explain(outer) == ""
    made = Sandbox(mode="strict", writable=(str(tmp_path),), capabilities=("CAP_CHOWN",))
    monkeypatch.setattr(sandbox, "_active", made)
    assert sandbox.explain(inner) == sandbox.explain(null) == ""
    assert "(strict) that does not let it write to /elsewhere/b.sock: start it with --sandbox-path" in sandbox.explain(
        outer
    )
