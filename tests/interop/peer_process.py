"""A peer as a child process: its output in a file, its end guaranteed.

Every peer dies with the test run, however that ends: the kernel kills it when the thread that started it is gone.
Only process ids started here are ever signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

PR_SET_PDEATHSIG = 1  # prctl(2)
TAIL = 4000  # characters of a log that a failure shows
PATIENCE = 60.0  # seconds; generous, for machines that do other things as well

_libc = ctypes.CDLL(None, use_errno=True)


class PeerError(AssertionError):
    """A peer ended, refused or did not do in time what a test needs; the message carries the end of its log."""


def require(program: str, packages: str) -> str:
    """The path of a peer's program. A peer that is missing fails the test: an interoperability test is never skipped.

    Raises PeerError that names the Debian packages to install.
    """
    found = shutil.which(program) or (program if os.access(program, os.X_OK) else None)
    if found is None:
        raise PeerError(f"{program} is not installed, and this test needs it: apt-get install {packages}")
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Return as soon as `condition()` holds.

    Raises PeerError naming `what` after `seconds`. A machine that stood still meanwhile, as virtual ones do, gets to
    look as often as one that did not.
    """
    end = time.monotonic() + seconds
    looks = 0
    while not condition():
        looks += 1
        if time.monotonic() > end and looks > 2 * seconds:
            raise PeerError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class PeerProcess:
    """One running peer program, its standard input a pipe, its output and errors in `log`.

    With `answers`, its standard output goes to that file instead: a peer whose threads write to standard error whenever
    they like would else tear its answers, and its prompt, in two.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str] | None = None,
        answers: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.answers = answers
        with log.open("ab") as errors, (answers or log).open("ab") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                preexec_fn=_die_with_parent,
            )
        self.pid = self.process.pid

    def say(self, line: str) -> None:
        """Write one line to the peer's standard input.

        Raises PeerError when the peer has ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self.name} ended before {line!r}:\n{self.tail()}") from None

    def output(self) -> str:
        """All that the peer has written so far."""
        return self.log.read_text(errors="replace") + (self.answered() if self.answers else "")

    def answered(self) -> str:
        """What it has written to its standard output so far, and nothing else if it was started with `answers`."""
        return (self.answers or self.log).read_text(errors="replace")

    def tail(self) -> str:
        """The end of the peer's output, for messages."""
        return self.output()[-TAIL:]

    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process.poll() is None

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Return as soon as `condition()` holds.

        Raises PeerError with the end of the log when the peer ends first, or after `seconds`.
        """

        def held() -> bool:
            ended = not self.running()
            if condition():  # asked after the process, so that what it did last is seen
                return True
            if ended:
                status = self.process.returncode
                raise PeerError(f"{self.name} ended with status {status} before {what}:\n{self.tail()}")
            return False

        try:
            wait_until(held, f"{self.name}: {what}", seconds)
        except PeerError as error:
            raise PeerError(f"{error}\n{self.tail()}") from None

    def wait_for_output(self, text: str, count: int = 1, seconds: float = PATIENCE) -> None:
        """Return as soon as `text` stands `count` times in the peer's output; raises PeerError as `wait_for` does."""
        self.wait_for(lambda: self.output().count(text) >= count, f"{text!r} in its output", seconds)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()
        self._close_input()

    def stop(self, seconds: float = 15) -> int:
        """SIGTERM, then SIGKILL after `seconds`; returns the exit status (negative: the signal that ended it)."""
        self._close_input()
        if self.running():
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def _close_input(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
