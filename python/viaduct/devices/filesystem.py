"""A directory of this host in the guest (virtio 1.2, 5.11): virtiofsd, found, started, watched and ended.

The file server behind a virtio filesystem is a large program that others keep well, so it is not written again here.
`Virtiofsd` runs one for a directory; it listens on a vhost-user socket, to which QEMU (vhost-user-fs-pci) or a machine
of ours connects. There are two: the one in Rust, which is maintained, and its predecessor in C, which QEMU brought
along up to 7.2 (Debian 12). They differ in their options and not in what they serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

from viaduct.devices.child_process import die_with_parent

log = logging.getLogger("viaduct.devices")

PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
"""Where distributions put it, which is not where a shell looks."""
ENVIRONMENT = "VIADUCT_VIRTIOFSD"
PATIENCE = 30.0
"""Seconds until it has to listen."""
LAST_WORDS = 2000
"""Bytes of its output that an error shows."""


class FilesystemError(Exception):
    """A directory cannot be shared; the message says why and what to do."""


class Kind(Enum):
    """Which virtiofsd it is."""

    RUST = "virtiofsd"
    C = "QEMU's virtiofsd"


def find_virtiofsd() -> Path:
    """The program: what the variable VIADUCT_VIRTIOFSD names, or the first of PATH and of where distributions put it.

    Raises `FilesystemError`.
    """
    if named := os.environ.get(ENVIRONMENT):
        if not os.access(named, os.X_OK):
            raise FilesystemError(f"{ENVIRONMENT} names {named}, which is no program")
        return Path(named)
    for place in (shutil.which("virtiofsd"), *PLACES):
        if place is not None and os.access(place, os.X_OK):
            return Path(place)
    raise FilesystemError(
        "sharing a directory needs virtiofsd, which is not installed: apt-get install virtiofsd (Debian 13, Ubuntu "
        f"24.04), apt-get install qemu-system-common (Debian 12), or name it in {ENVIRONMENT}"
    )


class Virtiofsd:
    """Serves `directory` on the vhost-user socket `socket` (one in a directory of its own by default) while it is
    started: ``async with Virtiofsd("/srv") as share: ... share.socket``.

    `read_only` is only there with the one in Rust. Raises `FilesystemError` for what cannot be shared.
    """

    def __init__(self, directory: str | Path, socket: str | Path | None = None, *, read_only: bool = False) -> None:
        self.directory = Path(directory).resolve()
        self.read_only = read_only
        if not self.directory.is_dir():
            raise FilesystemError(f"{directory} is no directory that could be shared")
        self._program = find_virtiofsd()
        self._scratch = Path(tempfile.mkdtemp(prefix="viaduct-fs-")) if socket is None else None
        self.socket = Path(socket) if socket is not None else (self._scratch or Path()) / "fs.sock"
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._said = b""
        self.ended = asyncio.Event()
        """The program has left, by itself or not."""

    async def start(self) -> None:
        """Starts it and waits until it listens. Raises `FilesystemError` with what it said if it does not."""
        try:
            command = [str(self._program), *self._options(await self._kind())]
            # It ends when this process does, however that ends.
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
            self._listening = asyncio.create_task(self._listen(self._process))
            async with asyncio.timeout(PATIENCE):
                while not self.socket.exists():
                    if self.ended.is_set():
                        raise FilesystemError(f"{self._program} ended at once{self._words()}")
                    await asyncio.sleep(0.01)
        except TimeoutError:
            await self.close()
            raise FilesystemError(f"{self._program} does not listen after {PATIENCE:g} s{self._words()}") from None
        except OSError as error:
            await self.close()
            raise FilesystemError(f"{self._program} cannot be started: {error.strerror}") from error
        except BaseException:
            await self.close()
            raise

    async def _kind(self) -> Kind:
        process = await asyncio.create_subprocess_exec(
            self._program, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        return Kind.C if b"QEMU" in output or b"FUSE kernel interface" in output else Kind.RUST

    def _options(self, kind: Kind) -> list[str]:
        socket = f"--socket-path={self.socket}"
        if kind is Kind.C:
            if self.read_only:
                raise FilesystemError(
                    f"{self._program} is {kind.value}, which cannot share read-only; mount it read-only in the guest, "
                    f"or install the newer virtiofsd and name it in {ENVIRONMENT}"
                )
            return [socket, "-f", "-o", f"source={self.directory}", "-o", "cache=auto"]
        # A user without privileges has no mounts of its own to give; what he shares, he can reach anyway.
        sandbox = "namespace" if os.geteuid() == 0 else "none"
        return [
            socket,
            f"--shared-dir={self.directory}",
            f"--sandbox={sandbox}",
            *(["--readonly"] if self.read_only else []),
        ]

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while part := await process.stdout.read(4096):
            self._said = (self._said + part)[-LAST_WORDS:]
        status = await process.wait()
        self.ended.set()
        log.info("%s for %s has ended with status %d%s", self._program, self.directory, status, self._words())

    def _words(self) -> str:
        said = self._said.decode(errors="replace").strip()
        return f"; it said:\n{said}" if said else " without a word"

    async def close(self) -> None:
        """Ends it and removes its socket. May be called twice."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(PATIENCE):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._listening is not None:
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None
        self.socket.unlink(missing_ok=True)
        self.socket.with_name(f"{self.socket.name}.pid").unlink(missing_ok=True)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
