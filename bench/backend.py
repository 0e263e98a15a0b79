"""What the benchmark asks of a vhost-user back-end, whoever made it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from bench.process import Program, ProgramError


class Work(NamedTuple):
    """Totals since the back-end's start: time-stamp counter cycles spent on passes that moved packets, and packets."""

    cycles: int
    packets: int


class BackEnd(ABC):
    """A switch with two or more vhost-user ports that polls on one CPU.

    `directory` is an empty directory of its own. The back-end listens on `sockets`, created by `start`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    hugepages_mb: ClassVar[int]
    ports: ClassVar[int] = 2
    guest_hugepages: ClassVar[bool] = True
    """Whether the guests' memory (the generator's, that is) lies in hugepages."""

    def __init__(self, directory: Path, cpu: int) -> None:
        self.directory = directory
        self.cpu = cpu
        self.sockets = [directory / f"port{index}" for index in range(self.ports)]
        self.launched = 0.0
        """Time of the epoch just before the switch's process was started."""
        self.tsc_hz = 0
        """Rate of the time-stamp counter, for those who count their work in seconds. Set once a generator knows it."""

    @abstractmethod
    def start(self, options: Sequence[str] = ()) -> None:
        """Start it; returns when its process runs, not when its sockets exist. `options` are added to its command."""

    @abstractmethod
    def program(self) -> Program:
        """The process that forwards."""

    @abstractmethod
    def work(self) -> Work:
        """What it has done so far, by its own count."""

    @abstractmethod
    def stop(self) -> None:
        """End all its processes. Safe to call twice, and after a failed start."""

    def settle(self, timeout: float = 20) -> None:
        """Wait until it has made its sockets and answers: one that is still configuring itself may drop a connection.

        Raises ProgramError when that takes longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not all(path.exists() for path in self.sockets):
            self.program().check()
            if time.monotonic() > deadline:
                raise ProgramError(f"{self.name} has not made its sockets within {timeout:g} s")
            time.sleep(0.01)
        self.work()

    def pause(self) -> None:
        self.program().pause()

    def resume(self) -> None:
        self.program().resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
