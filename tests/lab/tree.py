"""A directory of unpacked packages, and programs in it that run on this host.

A program is started through the tree's own dynamic loader with the tree's own libraries, so it does not matter what the
host has: on Debian 12 a QEMU from the backports stands beside the installed one without either noticing.
No maintainer script ever ran in the tree: what the lab needs of their work, image.py does.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from .packages import LabError

MERGED = ("bin", "sbin", "lib", "lib64")
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/lib/modules", "lib/modules")
"""Not needed in the lab; of the kernel's modules only some are (image.py)."""


class Tree:
    """The tree below `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._libraries = path / "usr/lib/x86_64-linux-gnu"

    def unpack(self, packages: Iterable[Path]) -> None:
        """Unpack packages into the tree, except for what the lab has no use for."""
        for name in MERGED:
            (self.path / "usr" / name).mkdir(parents=True, exist_ok=True)
            (self.path / name).symlink_to(f"usr/{name}")
        for package in packages:
            self.unpack_parts(package, ["--anchored", *(f"--exclude=./{directory}/*" for directory in LEFT_OUT)])

    def unpack_parts(self, package: Path, options: Iterable[str]) -> None:
        """Unpack what tar's options choose of one package. Raises LabError if it cannot be read."""
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as archive:
            keep = ["--keep-directory-symlink", "--no-same-owner", "--delay-directory-restore"]
            command = ["tar", "--extract", "--directory", str(self.path), *keep, *options]
            done = subprocess.run(command, stdin=archive.stdout, capture_output=True, text=True)
        if archive.returncode or done.returncode:
            raise LabError(f"{package} does not unpack: {done.stderr.strip()}")

    def command(self, program: str, *arguments: str | Path) -> list[str]:
        """The command line that runs a program of the tree, given by its path in it, on this host."""
        loader = self._libraries / "ld-linux-x86-64.so.2"
        here = self.path / program
        while here.is_symlink():  # absolute ones are meant from the tree's root
            here = self.path / (here.parent.relative_to(self.path) / here.readlink()).as_posix().lstrip("/")
        if not here.exists():
            raise LabError(f"there is no {here}: remove {self.path.parent} and run make lab")
        names = ["--library-path", str(self._libraries), "--argv0", Path(program).name]
        return [str(loader), *names, str(here), *map(str, arguments)]

    def run(self, program: str, *arguments: str | Path) -> None:
        """Run a program of the tree here. Raises LabError with what it said when it fails."""
        command = self.command(program, *arguments)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"{program} left with status {done.returncode}: {done.stdout}{done.stderr}")

    @property
    def python(self) -> str:
        """The path of the tree's Python in it, "usr/bin/python3.11"."""
        return f"usr/bin/{(self.path / 'usr/bin/python3').readlink()}"
