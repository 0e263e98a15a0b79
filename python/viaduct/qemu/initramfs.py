"""The first root directory of a Linux guest, as the archive that its kernel unpacks (initramfs, "newc" form)."""

from __future__ import annotations

import stat
from pathlib import PurePosixPath

DIRECTORIES = ("bin", "dev", "proc", "sys", "tmp", "modules")


def initramfs(files: dict[str, bytes], links: dict[str, str]) -> bytes:
    """The archive: files by path, which are executable, symbolic links, and the directories that they are in."""
    archive = bytearray()

    def add(name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0")
        archive.extend(bytes(-len(archive) % 4))
        archive.extend(content)
        archive.extend(bytes(-len(archive) % 4))

    parents = {str(parent) for name in (*files, *links) for parent in PurePosixPath(name).parents} - {"."}
    for name in sorted(parents.union(DIRECTORIES)):
        add(name, stat.S_IFDIR | 0o755, b"")
    add("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))
    for name, content in files.items():
        add(name, stat.S_IFREG | 0o755, content)
    for name, target in links.items():
        add(name, stat.S_IFLNK | 0o777, target.encode())
    add("TRAILER!!!", 0, b"")
    return bytes(archive)
