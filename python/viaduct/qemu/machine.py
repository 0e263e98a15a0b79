"""A Linux guest in QEMU with one network card on a vhost-user socket, and a shell in it.

The host's end of the image's `init.sh`: requests and answers pass a serial port as lines, in base64.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
from contextlib import suppress
from pathlib import Path

from .linux_image import LinuxImage

KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=0 nokaslr mitigations=off tsc=reliable no_timer_check random.trust_cpu=on rdinit=/init"
)
LINE_MAX = 1 << 24
BOOT_PATIENCE = {"kvm": 10.0, "tcg": 120.0}
"""Seconds; on an idle machine two boot in four by emulation, and in less than one with KVM."""


class MachineError(Exception):
    """QEMU is missing or ended, or the guest does not answer; the message says what to do or has QEMU's last words."""


class Machine:
    """A running guest: `async with Machine(...) as machine: await machine.run("ip addr")`.

    `directory` is for its sockets and logs. `socket` is the switch's. Without KVM on this host QEMU emulates.
    """

    def __init__(
        self, name: str, image: LinuxImage, directory: Path, socket: Path, mac: str, memory: str = "256M"
    ) -> None:
        self.name = name
        self._image = image
        self._socket = socket
        self._mac = mac
        self._memory = "384M"
        self.accelerator = ""
        """What runs the guest's instructions, once it is up: `kvm`, or `tcg`, QEMU's emulation."""
        self._agent = directory / f"{name}.agent"
        self._log = directory / f"{name}.log"
        self._console = directory / f"{name}.console"
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Machine:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def run(self, script: str, patience: float = 60.0) -> str:
        """Run a shell script in the guest and return what it wrote.

        Raises MachineError when it fails or takes longer than `patience` seconds.
        """
        assert self._writer is not None
        self._writer.write(b"script " + base64.b64encode(script.encode()) + b"\n")
        _, status, *output = (await self._line("script ", patience)).split()
        text = base64.b64decode(output[0]).decode(errors="replace") if output else ""
        if status != "0":
            raise MachineError(f"{self.name}: status {status} from {script!r}: {text.strip()}")
        return text

    async def close(self) -> None:
        """End the machine, at once."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def start(self) -> None:
        """Start QEMU and wait until the guest is up. Raises MachineError.

        KVM is tried first where it may be used; where it does not work (some clouds only half provide it), QEMU
        emulates.
        """
        program = shutil.which("qemu-system-x86_64")
        if program is None:
            raise MachineError("QEMU is not installed: apt-get install qemu-system-x86")
        if os.access("/dev/kvm", os.R_OK | os.W_OK):
            try:
                await self._boot(program, "kvm")
            except MachineError:
                await self.close()
            else:
                return
        await self._boot(program, "tcg")

    async def _boot(self, program: str, accelerator: str) -> None:
        self._agent.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                program, *self._arguments(accelerator), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        while True:
            try:
                self._reader, self._writer = await asyncio.open_unix_connection(self._agent, limit=LINE_MAX)
                break
            except OSError:
                if self._process.returncode is not None:
                    raise MachineError(f"{self.name}: QEMU ended: {self._last_words()}") from None
                await asyncio.sleep(0.02)
        await self._line("ready ", BOOT_PATIENCE[accelerator])
        self.accelerator = accelerator

    def _arguments(self, accelerator: str) -> list[str]:
        # Without KVM, QEMU 7.2 crashes when a driver starts a vhost-user network device that has MSI-X interrupts.
        vectors = ",vectors=0" if accelerator == "tcg" else ""
        return [
            "-name", self.name, "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "q35,memory-backend=ram", "-m", self._memory,
            "-accel", accelerator, "-cpu", "host" if accelerator == "kvm" else "max,-la57",
            "-object", f"memory-backend-memfd,id=ram,size={self._memory},share=on",
            "-kernel", str(self._image.kernel), "-initrd", str(self._image.initramfs), "-append", KERNEL_ARGUMENTS,
            "-serial", f"file:{self._console}",
            "-chardev", f"socket,id=agent,path={self._agent},server=on,wait=off", "-serial", "chardev:agent",
            "-chardev", f"socket,id=c0,path={self._socket},reconnect=1",
            "-netdev", "vhost-user,id=n0,chardev=c0",
            "-device", f"virtio-net-pci,netdev=n0,mac={self._mac},packed=on,romfile={vectors}",
        ]  # fmt: skip

    async def _line(self, beginning: str, patience: float) -> str:
        """The guest's next line that begins like this."""
        assert self._reader is not None
        try:
            async with asyncio.timeout(patience):
                while line := (await self._reader.readline()).decode(errors="replace").strip("\r\n"):
                    if line.startswith(beginning):
                        return line
        except TimeoutError:
            raise MachineError(f"{self.name}: no answer in {patience:.0f} s: {self._last_words()}") from None
        except OSError:
            pass  # QEMU ended with something unread
        raise MachineError(f"{self.name}: QEMU ended: {self._last_words()}")

    def _last_words(self) -> str:
        logs = (self._log, self._console)
        return " ".join(log.read_text(errors="replace")[-300:].strip() for log in logs if log.exists()) or "no words"
