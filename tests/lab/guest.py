"""A guest in the lab, run by us or by QEMU's microvm: its console is a UNIX socket, on which it answers scripts.

The guest's end is guest_init.sh. Scripts and answers pass the console as lines, in base64, so that the kernel's
messages cannot be taken for either.
"""

from __future__ import annotations

import base64
import itertools
import re
import select
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from interop.peer_process import PeerError, PeerProcess

from .guest_evidence import guest_evidence

BOOT = Path("/guest")
QUICK = (
    "console=ttyS0 panic=-1 reboot=t loglevel=1 tsc=reliable no_timer_check mitigations=off nokaslr "
    "nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
)
"""Kernel arguments that save a guest in the lab a second of measuring its clocks and of defending itself, and that keep
it from talking into its answers when the host is too busy to let it run."""
PATIENCE = 300.0  # seconds; a boot takes 5 to 10 where nobody else works, and minutes on a crowded host
SCRIPT_MAX = 3000  # characters: a terminal's line has 4095, and base64 makes four of three
TAIL = 3000


class Guest:
    """One virtual machine. `with Guest(...) as guest:` starts it, waits until it is ready, and ends it.

    `command` starts it and gives it the socket `directory`/NAME.console as its serial console.
    """

    def __init__(self, name: str, command: Sequence[str], directory: Path, ours: bool = True) -> None:
        self.name = name
        self.command = list(command)
        self._ours = ours
        self.uptime = 0.0
        """The guest's clock, in seconds, when it was ready."""
        self._directory = directory
        self._tags = itertools.count()
        self._lines: list[str] = []
        self._received = b""
        self.process: PeerProcess | None = None

    def start(self) -> None:
        """Start it and reach its console. Raises PeerError when it ends at once."""
        path = self._directory / f"{self.name}.console"
        path.unlink(missing_ok=True)
        self.process = PeerProcess(self.name, self.command, self._directory / f"{self.name}.log")
        self._console = socket.socket(socket.AF_UNIX)
        self.process.wait_for(lambda: self._console.connect_ex(str(path)) == 0, "its console", PATIENCE)

    def wait_ready(self, seconds: float = PATIENCE) -> None:
        """Wait until the guest's shell is there. Raises PeerError with the console's last words."""
        self.uptime = float(self.expect(r"ready ([\d.]+)", seconds)[1])

    def expect(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """The next line on the console that is like this. Raises PeerError when none comes."""
        end = time.monotonic() + seconds
        while True:
            line = self._line(end, pattern)
            if match := re.fullmatch(pattern, line):
                return match

    def run(self, script: str, seconds: float = PATIENCE, check: bool = True) -> str:
        """Run a shell script in the guest and return what it wrote.

        Raises PeerError when that takes too long, or when its status is not 0, if that is to be checked.
        """
        status, output = self.ask(script, seconds)
        if check and status:
            raise PeerError(f"{self.name}: status {status} from\n{script}\n{output}\n{self.evidence()}")
        return output

    def ask(self, script: str, seconds: float = PATIENCE) -> tuple[int, str]:
        """The status and the output of a shell script in the guest. Raises PeerError when it takes too long."""
        assert len(script) <= SCRIPT_MAX, f"{len(script)} characters in one line of a terminal"
        tag = f"request{next(self._tags)}"
        self._console.sendall(f"{tag} {base64.b64encode(script.encode()).decode()}\n".encode())
        answer = self.expect(rf".*{tag} (\d+) (\S*)", seconds)
        return int(answer[1]), base64.b64decode(answer[2]).decode(errors="replace")

    def send(self, script: str) -> None:
        """Have a shell script run without waiting for its end."""
        self._console.sendall(f"unasked {base64.b64encode(script.encode()).decode()}\n".encode())

    def _line(self, end: float, what: str) -> str:
        while b"\n" not in self._received:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._console], [], [], left)[0]:
                assert self.process is not None
                doing = guest_evidence(self.name, self.process.pid, self._ours)
                raise PeerError(f"{self.name}: no {what!r} in time\n{self.evidence()}\n{doing}")
            data = self._console.recv(65536)
            if not data:
                raise PeerError(f"{self.name}: ended before {what!r}\n{self.evidence()}")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        self._lines.append(line.decode(errors="replace").strip("\r"))
        return self._lines[-1]

    def evidence(self) -> str:
        """The last words of the console and of the program that runs the guest."""
        console = "\n".join([*self._lines, self._received.decode(errors="replace")])[-TAIL:]
        log = self.process.tail() if self.process else ""
        return f"console:\n{console}\n{shlex.join(self.command)}:\n{log}"

    def power_off(self, seconds: float = PATIENCE) -> int:
        """Let the guest turn itself off; the status with which its program ends."""
        assert self.process is not None
        self.send("poweroff -f")
        return self.ended(seconds)

    def ended(self, seconds: float = PATIENCE) -> int:
        """Wait for the program's end and return its status. Raises PeerError if it does not come."""
        assert self.process is not None
        try:
            return self.process.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise PeerError(f"{self.name}: still there after {seconds:.0f} s\n{self.evidence()}") from None

    def kill(self) -> None:
        """The program's end by SIGKILL, as if somebody had pulled the plug."""
        assert self.process is not None
        self.process.kill()
        self._console.close()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it, if it runs."""
        if self.process is not None:
            self.process.stop()
            self._console.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def viaduct_guest(
    name: str, directory: Path, *options: str, kernel: str = "vmlinux", append: str = "", memory: str = "256M"
) -> Guest:
    """A guest in a machine of ours; `options` are further ones of `viaduct run`.

    Its machine ends with a reset that nobody asked for, and says where it was, unless `--on-reset` is among them.
    """
    if "--on-reset" not in options:
        options = (*options, "--on-reset", "stop")
    command = [
        "viaduct", "run", "--name", name, "--kernel", str(BOOT / kernel), "--initrd", str(BOOT / "initramfs"),
        "--append", f"{QUICK} {append}".strip(), "--memory", memory,
        "--console", f"socket:{directory / name}.console", *options,
    ]  # fmt: skip
    return Guest(name, command, directory)


def microvm_guest(
    name: str, directory: Path, *options: str, kernel: str = "vmlinux", append: str = "", memory: str = "256M"
) -> Guest:
    """The same guest in QEMU's microvm; `options` are further ones of QEMU."""
    command = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "microvm,isa-serial=on,memory-backend=ram", "-accel", "kvm", "-cpu", "host", "-m", memory,
        "-object", f"memory-backend-memfd,id=ram,size={memory},share=on",
        "-kernel", str(BOOT / kernel), "-initrd", str(BOOT / "initramfs"), "-append", f"{QUICK} {append}".strip(),
        "-chardev", f"socket,id=console,path={directory / name}.console,server=on,wait=on",
        "-serial", "chardev:console", *options,
    ]  # fmt: skip
    return Guest(name, command, directory, ours=False)
