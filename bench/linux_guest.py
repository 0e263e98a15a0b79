"""A Linux guest in QEMU for measurements: one network card of any kind, and a shell for the host.

The image is the package's own (viaduct.qemu), with the program `stream` added; its `init.sh` is the other end of `run`.
"""

import base64
import itertools
import os
import select
import shutil
import socket
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Self

from bench import programs
from bench.process import Program, ProgramError
from viaduct.qemu.linux_image import LinuxImage, linux_image
from viaduct.qemu.linux_kernel import LinuxImageError
from viaduct.qemu.machine import KERNEL_ARGUMENTS

BOOT_S = 120.0
ANSWER_S = 60.0
_MEMORY = "384M"


@cache
def image() -> LinuxImage:
    """The image, made when it is not in the cache. Raises ProgramError with what is missing."""
    program = programs.stream()
    try:
        return linux_image((program,), lambda _: {"bin/stream": program.read_bytes()})
    except LinuxImageError as error:
        raise ProgramError(str(error)) from None


def vhost_user(path: Path, mac: str, *, server: bool = False, packed: bool = True) -> list[str]:
    """QEMU's arguments for a card on a vhost-user socket, on which QEMU listens if it is the `server`.

    Interrupts go without MSI-X: QEMU 7.2 crashes with it where it emulates the processor.
    """
    role = "server=on,wait=off" if server else "reconnect=1"
    return [
        "-chardev", f"socket,id=c0,path={path},{role}", "-netdev", "vhost-user,id=n0,chardev=c0",
        "-device", f"virtio-net-pci,netdev=n0,mac={mac},packed={'on' if packed else 'off'},romfile=,vectors=0",
    ]  # fmt: skip


def tap(interface: str, mac: str) -> list[str]:
    """QEMU's arguments for a card on an existing tap interface, served by QEMU itself, with all offloads."""
    return [
        "-netdev", f"tap,id=n0,ifname={interface},script=no,downscript=no,vhost=off",
        "-device", f"virtio-net-pci,netdev=n0,mac={mac},packed=on,romfile=,vectors=0",
    ]  # fmt: skip


class LinuxGuest:
    """A guest whose card is given by QEMU's arguments; `launcher` is put in front of the command."""

    def __init__(
        self, name: str, directory: Path, network: Sequence[str], address: str, launcher: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.address = address
        self._directory = directory
        self._network = network
        self._launcher = launcher
        self._tags = itertools.count()
        self._received = b""
        self._agent = socket.socket(socket.AF_UNIX)
        self._program: Program | None = None

    def start(self) -> None:
        """Start QEMU; `ready` waits for the guest. Raises ProgramError."""
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None:
            raise ProgramError("QEMU is missing: apt-get install qemu-system-x86")
        agent = self._directory / f"{self.name}.agent"
        agent.unlink(missing_ok=True)
        files = image()
        command = [
            *self._launcher, qemu, "-name", self.name, "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "max,-la57", "-m", _MEMORY,
            "-object", f"memory-backend-memfd,id=ram,size={_MEMORY},share=on",
            "-kernel", str(files.kernel), "-initrd", str(files.initramfs), "-append", KERNEL_ARGUMENTS,
            "-serial", f"file:{self._directory / self.name}.console",
            "-chardev", f"socket,id=agent,path={agent},server=on,wait=off", "-serial", "chardev:agent",
            *self._network,
        ]  # fmt: skip
        self._program = Program(self.name, command)
        deadline = time.monotonic() + ANSWER_S
        while self._agent.connect_ex(str(agent)) != 0:
            self._program.check()
            if time.monotonic() > deadline:
                raise ProgramError(f"QEMU ({self.name}) made no socket for its guest's shell in {ANSWER_S:g} s")
            time.sleep(0.02)

    def ready(self, timeout: float = BOOT_S) -> None:
        """Wait for the boot, and give the card its address."""
        while not self._line(timeout).startswith("ready "):
            pass
        self.run(f"ip link set eth0 up && ip addr add {self.address}/24 dev eth0")

    def program(self) -> Program:
        assert self._program is not None
        return self._program

    def run(self, script: str, timeout: float = ANSWER_S) -> str:
        """Run a shell script and return what it wrote. Raises ProgramError when it fails or takes longer."""
        tag = f"request{next(self._tags)}"
        self._agent.sendall(f"{tag} {base64.b64encode(script.encode()).decode()}\n".encode())
        while (words := self._line(timeout).split())[:1] != [tag]:
            pass
        text = base64.b64decode(words[2]).decode(errors="replace") if words[2:] else ""
        if words[1] != "0":
            raise ProgramError(f"{self.name}: status {words[1]} from {script!r}: {text.strip()}")
        return text

    def _line(self, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._agent], [], [], left)[0]:
                self.program().check()
                raise ProgramError(f"{self.name} (a guest in QEMU) has not answered for {timeout:g} s")
            if not (data := self._agent.recv(65536)):
                raise ProgramError(f"{self.name}: QEMU has ended")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").strip()

    def reaches(self, address: str, timeout: float = 30) -> None:
        """Wait until a ping is answered."""
        self.run(f"until ping -c 1 -W 1 {address} >/dev/null; do :; done", timeout)

    def confine(self, cpus: set[int]) -> None:
        """Let all its threads run on these CPUs only."""
        for thread in self.program().threads():
            os.sched_setaffinity(thread, cpus)

    def stop(self) -> None:
        self._agent.close()
        if self._program is not None:
            self._program.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
