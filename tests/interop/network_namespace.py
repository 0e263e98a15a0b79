"""A network namespace without a name: alive as long as a process of ours in it, gone with that."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from interop.peer_process import PATIENCE, PeerError, require

PACKAGES = "util-linux iproute2 busybox-static"


class NetworkNamespace:
    """`with NetworkNamespace() as namespace:` makes one; whoever is not root gets a user namespace along with it."""

    def __enter__(self) -> Self:
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        # `cat` keeps the namespace until the pipe to it is closed, which happens at the latest when this process ends.
        command = [require("unshare", PACKAGES), *user, "--net", "cat"]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE)
        nsenter = require("nsenter", PACKAGES)
        self.enter = [
            nsenter,
            "--target",
            str(self._keeper.pid),
            *(["--user", "--preserve-credentials"] if user else []),
            "--net",
        ]
        end = time.monotonic() + PATIENCE
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._keeper.pid}/ns/net") == own:
            if self._keeper.poll() is not None or time.monotonic() > end:
                raise PeerError(f"{' '.join(command)} made no network namespace")
            time.sleep(0.01)
        return self

    def run(self, command: Sequence[str]) -> str:
        """Run a command in the namespace and return its output; raises PeerError when it fails."""
        require(command[0], PACKAGES)
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True, timeout=2 * PATIENCE)
        if done.returncode:
            raise PeerError(f"{' '.join(command)} left with status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    @contextmanager
    def spawn(self, command: Sequence[str]) -> Iterator[None]:
        """Keep a command running in the namespace inside a `with` block."""
        process = subprocess.Popen([*self.enter, *command])
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._keeper.communicate()
