"""A file that is loaded into a guest: a kernel or an initrd. Read by pieces, never as a whole; never trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from viaduct.vmm.boot.errors import BootError

PIECE = 1 << 16


class Image:
    """An open file of known size. A context manager that closes it."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.size = os.fstat(fd).st_size
        self._fd = fd

    @classmethod
    def open(cls, path: str | Path, option: str) -> Self:
        """Open what the command line's `option` names. Raises BootError where that is no file with something in it."""
        name = f"{option} {path}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise BootError(name, "no such file", "see that the path is right") from None
        except PermissionError:
            raise BootError(name, "you may not read it", f"try: sudo chmod a+r {path}, or copy it") from None
        except OSError as error:
            raise BootError(name, f"cannot be opened: {error.strerror}", "name another file") from None
        mode = os.fstat(fd).st_mode
        kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a character device"))
        found = next((kind for test, kind in kinds if test(mode)), None if stat.S_ISREG(mode) else "no regular file")
        if found is None and os.fstat(fd).st_size == 0:
            found = "an empty file"
        if found is not None:
            os.close(fd)
            raise BootError(name, f"is {found}", "name a regular file that is not empty")
        return cls(name, fd)

    @classmethod
    def of(cls, name: str, pieces: Iterator[bytes]) -> Self:
        """An image that is no file: what `pieces` yields, kept outside the interpreter's memory."""
        fd = os.memfd_create("viaduct-image", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.writelines(pieces)
            return cls(name, fd)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def error(self, found: str, advice: str) -> BootError:
        """An error about this file."""
        return BootError(self.name, found, advice)

    def read(self, offset: int, size: int, what: str) -> bytes:
        """`size` bytes of the file, which are `what`. Raises BootError where it ends before."""
        if offset + size > self.size:
            raise self.error(
                f"ends at {self.size} bytes, inside {what} (bytes {offset} to {offset + size})",
                "it is truncated or damaged: copy or download it again",
            )
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise self.error(f"became shorter while {what} was read", "start again when nobody writes to it")
        return data

    def start(self, size: int) -> bytes:
        """The first bytes, as many of `size` as there are."""
        return os.pread(self._fd, size, 0)

    def pieces(self, offset: int, size: int, what: str) -> Iterator[tuple[int, bytes]]:
        """The same bytes as `read`, piece after piece, each with its place in them. Raises BootError likewise."""
        for place in range(0, size, PIECE):
            yield place, self.read(offset + place, min(PIECE, size - place), what)
