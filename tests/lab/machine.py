"""The lab itself: a machine of QEMU's that runs one command and is gone.

It emulates a server with AMD's virtualization (SVM with nested paging), an IOMMU with interrupt remapping, an SR-IOV
card (igb, behind a root port of its own) and another card (e1000e) cabled to it, and QEMU's `edu` device for tests of
DMA and interrupts. What the command writes comes out of virtio-serial ports as it is written.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from .checkout import make_checkout
from .image import LabImage, lab_image
from .packages import LabError

PR_SET_PDEATHSIG = 1  # prctl(2)
PORTS = ("stdout", "stderr", "status", "reports", "pulse")
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check apparmor=0 audit=0 "
    "random.trust_cpu=on intel_iommu=on amd_iommu=on nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
)
IOMMUS = {
    "intel": ("-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"),
    "amd": ("-device", "amd-iommu,intremap=on"),
    "none": (),
}
TAIL = 4000  # characters of the console that an error shows
ENDING = 2.0  # seconds from the end of QEMU's output to its own
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Hardware:
    """What may be chosen about the lab: its processors, its memory (QEMU's notation), the maker of its IOMMU."""

    processors: int = 2
    memory: str = "3G"
    iommu: str = "intel"


class Lab:
    """The lab with one command: `with Lab(["uname", "-a"]) as lab: text = lab.output["stdout"].read()`.

    `command` is run in /viaduct, this repository, or, with `shares`, in the first of these directories of the host,
    which the lab sees at the same paths. Without a command there is a shell on this terminal. `output` has a binary
    stream for each of PORTS. Raises LabError if the lab cannot be made here.
    """

    def __init__(
        self,
        command: Sequence[str] = (),
        shares: Sequence[Path] = (),
        hardware: Hardware | None = None,
        image: LabImage | None = None,
    ) -> None:
        self._image = image or lab_image()
        self._scratch = Path(tempfile.mkdtemp(prefix="viaduct-lab-"))
        self.output: dict[str, IO[bytes]] = {}
        try:
            self._start(command, [share.resolve() for share in shares], hardware or Hardware())
        except BaseException:
            self.close()
            raise

    def _start(self, command: Sequence[str], shares: Sequence[Path], hardware: Hardware) -> None:
        checkout = make_checkout(self._image, self._scratch)
        script = self._scratch / ("run" if command else "shell")
        script.write_text(_script(command, shares))
        ends = {name: os.pipe() for name in PORTS}
        self.output = {name: os.fdopen(reader, "rb", buffering=0) for name, (reader, _) in ends.items()}
        arguments = [
            *self._image.tree.command("usr/bin/qemu-system-x86_64"),
            *self._firmware(),
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-d", "cpu_reset",
            "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,-la57,-hypervisor",
            "-smp", str(hardware.processors), "-m", hardware.memory, *IOMMUS[hardware.iommu],
            "-kernel", str(self._image.kernel), "-initrd", str(self._image.initramfs), "-append", KERNEL_ARGUMENTS,
            "-fw_cfg", f"name=opt/viaduct/{script.name},file={script}",
            "-device", "isa-debug-exit,iobase=0xf4", "-device", "virtio-rng-pci",
            *_disk("root", self._image.root), *_disk("checkout", checkout),
            "-device", "virtio-serial-pci",
            "-netdev", "hubport,id=n0,hubid=0", "-device", "pcie-root-port,id=p0,chassis=1,slot=1",
            "-device", "igb,bus=p0,netdev=n0,mac=52:54:00:00:00:10,romfile=",
            "-netdev", "hubport,id=n1,hubid=0", "-device", "pcie-root-port,id=p1,chassis=2,slot=2",
            "-device", "e1000e,bus=p1,netdev=n1,mac=52:54:00:00:00:20,romfile=",
            "-device", "edu",
            "-serial", f"file:{self._console}" if command else "mon:stdio",
        ]  # fmt: skip
        for number, (name, (_, writer)) in enumerate(ends.items(), 1):
            arguments += [
                "-add-fd", f"fd={writer},set={number}",
                "-chardev", f"file,id={name},path=/dev/fdset/{number},append=on",
                "-device", f"virtserialport,name={name},chardev={name}",
            ]  # fmt: skip
        for number, share in enumerate(shares):
            arguments += ["-virtfs", f"local,mount_tag=share{number},path={share},security_model=none,multidevs=remap"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL if command else None,
                stdout=log if command else None,
                stderr=log,
                pass_fds=[writer for _, writer in ends.values()],
                preexec_fn=_die_with_parent,
            )
        for _, writer in ends.values():
            os.close(writer)

    @property
    def _log(self) -> Path:
        return self._scratch / "qemu.log"

    @property
    def _console(self) -> Path:
        return self._scratch / "console"

    def _firmware(self) -> list[str]:
        share = self._image.tree.path / "usr/share"
        return [word for name in ("qemu", "seabios") for word in ("-L", str(share / name))]

    def wait(self) -> int:
        """Wait for the lab's end and return the command's status. Read `output` meanwhile: its pipes hold little.

        Raises LabError if the lab ended before the command did.
        """
        with self.output["status"] as stream:
            status = stream.read().strip()
        self._process.wait()
        if not status:
            raise LabError(f"the lab ended before its command did.\n{self.evidence()}")
        return int(status)

    def wait_shell(self) -> None:
        """Wait until the shell is left."""
        self._process.wait()

    def evidence(self) -> str:
        """QEMU's status, and the ends of its log and of the lab's console."""
        try:
            state = f"left with status {self._process.wait(ENDING)}"
        except subprocess.TimeoutExpired:
            state = "runs"
        texts = [file.read_text(errors="replace")[-TAIL:] for file in (self._log, self._console) if file.exists()]
        return f"QEMU, which {state}, and the console of the lab:\n" + "\n".join(texts)

    def kill(self) -> None:
        """End the lab now."""
        self._process.kill()

    def close(self) -> None:
        """End the lab if it still runs, and remove its files."""
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()
        for stream in self.output.values():
            stream.close()
        shutil.rmtree(self._scratch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _disk(name: str, file: Path) -> list[str]:
    drive = f"if=none,id={name},format=raw,readonly=on,file={file}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name}"]


def _script(command: Sequence[str], shares: Sequence[Path]) -> str:
    """What the lab's first process runs: it shows the shares where they are on the host, and starts the command."""
    lines = []
    for number, share in enumerate(shares):
        path = shlex.quote(str(share))
        options = "trans=virtio,version=9p2000.L,msize=512000,cache=loose"
        lines.append(f"mkdir -p {path} && mount -t 9p -o {options} share{number} {path} || exit 125")
    lines.append(f"cd {shlex.quote(str(shares[0])) if shares else '/viaduct'}")
    if command:
        lines.append(f"exec {shlex.join(command)}")
    return "".join(f"{line}\n" for line in lines)
