"""The `viaduct` command as processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAM = str(Path(sys.executable).parent / "viaduct")
PATIENCE = 60.0
"""Seconds until something that has to happen counts as not happening."""


def viaduct(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [PROGRAM, *words], capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **environment}
    )


def wait_until(true: Callable[[], object], what: str) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen in {PATIENCE} s: {what}")
        time.sleep(0.01)


class Daemon:
    """A running `viaduct switch` with its log and control socket."""

    def __init__(self, directory: Path, words: Sequence[str]) -> None:
        self.control = directory / "control.sock"
        self.log = directory / "switch.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [PROGRAM, "switch", "--control", str(self.control), *words], stdout=log, stderr=subprocess.STDOUT
            )

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until it has printed this."""
        wait_until(lambda: text in self.output() or self.process.poll() is not None, f"log has {text!r}")
        assert text in self.output(), f"ended with {self.process.returncode}: {self.output()}"

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to it."""
        return viaduct(*words, "--control", str(self.control))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it with a signal and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextmanager
def daemon(directory: Path, *words: str) -> Iterator[Daemon]:
    """A switch that is ready; killed in the end if it still runs."""
    started = Daemon(directory, words)
    try:
        started.wait_for('"kind":"ready"' if "json" in words else " ready: ")
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()


def plain(screen: str) -> str:
    """What a terminal was told, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
