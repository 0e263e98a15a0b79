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

    connects: ClassVar[bool] = False
    """Whether it connects to the sockets, on which the front-ends listen, instead of listening itself."""

    def __init__(self, directory: Path, cpu: int) -> None:
        self.directory = directory
        self.cpu = cpu
        self.sockets = [directory / f"port{index}" for index in range(self.ports)]
        self.launched = 0.0
        """Time of the epoch just before the switch's process was started."""
        self.launcher: Sequence[str] = ()
        """Put in front of the switch's command, to start it inside a network namespace for one."""
        self.tsc_hz = 0
        """Rate of the time-stamp counter, for those who count their work in seconds. Set once a generator knows it."""

    @abstractmethod
    def start(self, options: Sequence[str] = ()) -> None:
        """Start it; returns when its process runs, not when its sockets exist. `options` are added to its command."""

    def restart(self) -> None:
        """Start the switch again after its process was killed, with what is left of it in place."""
        self.start()

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
        while True:
            try:
                if self.connects or all(path.exists() for path in self.sockets):
                    self.work()
                    return
                failure = ProgramError(f"{self.name} has not made its sockets within {timeout:g} s")
            except ProgramError as error:  # a control socket may be there before all its commands are
                failure = error
            self.program().check()
            if time.monotonic() > deadline:
                raise failure
            time.sleep(0.01)

    def pause(self) -> None:
        self.program().pause()

    def resume(self) -> None:
        self.program().resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
