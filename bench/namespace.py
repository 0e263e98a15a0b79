"""A network namespace without a name: gone when the process that keeps it ends, interfaces and all."""

import os
import subprocess
import time
from typing import Self

from bench.process import Program, ProgramError


class Namespace:
    """`with Namespace() as namespace:`; `namespace.enter` in front of a command runs it inside."""

    def __init__(self) -> None:
        self._keeper = Program("namespace", ["unshare", "--net", "cat"])
        self.enter = ["nsenter", "--target", str(self._keeper.pid), "--net"]
        own, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 10
        while os.readlink(f"/proc/{self._keeper.pid}/ns/net") == own:
            self._keeper.check()
            if time.monotonic() > deadline:
                raise ProgramError("unshare --net has made no network namespace within 10 s")
            time.sleep(0.002)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *command: str, timeout: float = 30) -> str:
        """Run a command inside and return its output. Raises ProgramError when it fails or takes too long."""
        try:
            done = subprocess.run([*self.enter, *command], capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise ProgramError(f"{' '.join(command)} has not ended within {timeout:g} s") from None
        if done.returncode:
            raise ProgramError(f"{' '.join(command)} left with status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def wait_for_interface(self, name: str, timeout: float = 20) -> None:
        """Wait until a program has made an interface. Raises ProgramError."""
        deadline = time.monotonic() + timeout
        while f" {name}:" not in self.run("ip", "-o", "link"):
            if time.monotonic() > deadline:
                raise ProgramError(f"no interface {name} within {timeout:g} s")
            time.sleep(0.05)

    def stop(self) -> None:
        self._keeper.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
