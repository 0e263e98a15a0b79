"""A guest of a few bytes for tests: real mode, its code at `CODE`."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from typing import Any, Literal

from viaduct._core import GuestMemory, Vm

CODE = 0x1000
PATIENCE = 60.0
SEGMENT_16 = (0, 0, 0xFFFF, 0x3, 0, 1, 0, 0, 1, 0)
CODE_16 = (0, 0, 0xFFFF, 0xB, 0, 1, 0, 0, 1, 0)


def ram(size: int) -> GuestMemory:
    """Memory from address 0."""
    fd = os.memfd_create("ram")
    try:
        os.truncate(fd, size)
        return GuestMemory().with_region(0, size, 0, 0, fd)
    finally:
        os.close(fd)


class Flat:
    """A machine that runs `code` on every vCPU, and what happens to it."""

    def __init__(
        self,
        code: bytes,
        *,
        vcpus: int = 1,
        interrupts: Literal["kernel", "split", "none"] = "none",
        memory: int = 1 << 20,
        dirty_ring: int | None = None,
    ) -> None:
        self.events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.memory = ram(memory)
        self.memory.write(CODE, code)
        self.vm = Vm("kvm", self.memory, vcpus, interrupts=interrupts, dirty_ring=dirty_ring, on_event=self._event)
        for vcpu in range(vcpus):
            self.set_start(vcpu)

    def _event(self, kind: str, detail: dict[str, Any]) -> None:
        self.events.put((kind, detail))

    def set_start(self, vcpu: int) -> None:
        """The registers that a vCPU begins with."""
        segments: dict[str, object] = {name: SEGMENT_16 for name in ("ds", "es", "ss", "fs", "gs")}
        self.vm.set_registers(vcpu, segments | {"cs": CODE_16, "rip": CODE, "rsp": CODE, "rflags": 2})

    def wait(self, kind: str) -> dict[str, Any]:
        """The details of the next event of this kind; others before it are lost."""
        deadline = time.monotonic() + PATIENCE
        seen: list[tuple[str, dict[str, Any]]] = []
        while True:
            try:
                found, detail = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no event {kind} in {PATIENCE} s, but {seen}") from None
            if found == kind:
                return detail
            seen.append((found, detail))

    def close(self) -> None:
        self.vm.close()

    def __enter__(self) -> Flat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Registers:
    """A device that remembers its accesses, and answers reads with what it was given, the last one for ever."""

    def __init__(self, answers: list[bytes | int] | None = None) -> None:
        self.answers = answers or [b""]
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, bytes]] = []

    def read(self, offset: int, size: int) -> bytes | int:
        self.reads.append((offset, size))
        return self.answers[min(len(self.reads), len(self.answers)) - 1]

    def write(self, offset: int, data: bytes) -> None:
        self.writes.append((offset, data))


def until(condition: Callable[[], bool]) -> None:
    """Waits until `condition` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.001)
