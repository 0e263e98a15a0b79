"""A program under measurement: started with its output read line by line, weighed, paused and ended by its own pid."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class ProgramError(RuntimeError):
    """A program ended, or did not answer; the text has its last lines of output."""


class CpuTime(NamedTuple):
    """Time of one thread, in seconds: on a CPU, and runnable but waiting for one."""

    running: float
    waiting: float


class Footprint(NamedTuple):
    """Resident memory in bytes, without the guests' memory that a back-end maps."""

    small_pages: int
    huge_pages: int


# The kernel ends it when we die without having stopped it.
_WITH_US = ["setpriv", "--pdeathsig", "KILL"]


def _prefer(pid: int, niceness: int = -20) -> None:
    """Keep other programs off the measured cores as far as this user is allowed to.

    With autogroups a process's own niceness counts only within its session (sched(7)), so both are set.
    """
    if os.geteuid() != 0:
        return
    os.setpriority(os.PRIO_PROCESS, pid, niceness)
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


class Program:
    """One child process. `cpu` confines all its threads to one CPU; `environment` is added to ours."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cpu: int | None = None,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        pin = [] if cpu is None else ["taskset", "-c", str(cpu)]
        self.started = time.time()
        self._process = subprocess.Popen(
            [*_WITH_US, *pin, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | (environment or {}),
            cwd=cwd,
            start_new_session=True,
        )
        self.pid = self._process.pid
        _prefer(self.pid)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._last: deque[str] = deque(maxlen=30)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last.append(line.rstrip())
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def _failure(self, what: str) -> ProgramError:
        tail = "\n  ".join(self._last)
        return ProgramError(f"{self.name} (pid {self.pid}) {what}; the end of its output:\n  {tail}")

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("has ended") from None

    def line(self, timeout: float) -> str:
        """The next line of output. Raises ProgramError when it ends or stays silent for `timeout` seconds."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise self._failure(f"printed nothing for {timeout:g} s") from None
        if line is None:
            raise self._failure(f"ended with status {self._process.wait()}")
        return line

    def wait_for(self, text: str, timeout: float) -> str:
        """Skip output up to a line that contains `text`."""
        deadline = time.monotonic() + timeout
        while True:
            line = self.line(max(0.01, deadline - time.monotonic()))
            if text in line:
                return line

    def check(self) -> None:
        """Raise ProgramError if it has ended."""
        if self._process.poll() is not None:
            raise self._failure(f"ended with status {self._process.returncode}")

    def connected(self, path: Path, timeout: float = 20) -> socket.socket:
        """A connection to a socket that it makes when it is ready. Raises ProgramError."""
        deadline = time.monotonic() + timeout
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(timeout)
            try:
                connection.connect(str(path))
            except OSError as error:
                connection.close()
                self.check()
                if time.monotonic() > deadline:
                    raise self._failure(f"cannot be reached by {path} ({error})") from None
                time.sleep(0.005)
            else:
                return connection

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self, farewell: str | None = None, patience: float = 5) -> None:
        """End it: by its own command, then SIGTERM, then SIGKILL. Does nothing when it has ended."""
        if self._process.poll() is not None:
            return
        self.resume()
        try:
            if farewell is not None:
                self.say(farewell)
                self._process.wait(patience)
                return
        except (ProgramError, subprocess.TimeoutExpired):
            pass
        self._process.terminate()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def give_way(self) -> None:
        """Leave the CPU to the other programs under measurement, as far as they want it."""
        _prefer(self.pid, 19)

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def threads(self) -> dict[int, CpuTime]:
        """CPU time of each thread, by thread id."""
        times = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                running, waiting, _ = (task / "schedstat").read_text().split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            times[int(task.name)] = CpuTime(int(running) / 1e9, int(waiting) / 1e9)
        return times

    def mapped_files(self) -> frozenset[tuple[str, str]]:
        """The files it maps, as device and inode: how one finds the same memory in another process."""
        lines = [line.split() for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines()]
        return frozenset((fields[3], fields[4]) for fields in lines if fields[4] != "0")

    def footprint(self, guests: frozenset[tuple[str, str]]) -> Footprint:
        """Resident memory; the mappings of `guests`' memory (by their `mapped_files`) are left out."""
        small = huge = 0
        guest = False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            key, *rest = line.split()
            if not key.endswith(":"):
                shared_object = len(rest) > 4 and rest[4].startswith("/usr/")
                guest = (rest[2], rest[3]) in guests and not shared_object
            elif not guest and key == "Rss:":
                small += int(rest[0]) * 1024
            elif not guest and key in ("Private_Hugetlb:", "Shared_Hugetlb:"):
                huge += int(rest[0]) * 1024
        return Footprint(small, huge)
