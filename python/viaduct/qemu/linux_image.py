"""A small Linux for guests in QEMU: the distribution's kernel and drivers, busybox, and a shell for the host.

`init.sh` is its first process. What is made is kept in $VIADUCT_CACHE (~/.cache/viaduct), under a name that changes
with everything that goes into it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .initramfs import initramfs
from .linux_kernel import (
    LinuxImageError,
    downloaded_kernel,
    installed_kernel,
    plain_name,
    read_module,
    uncompressed,
    with_dependencies,
)

HERE = Path(__file__).parent
SOURCES = ("linux_image.py", "linux_kernel.py", "initramfs.py", "init.sh")
MODULES = ("virtio_pci", "virtio_net", "virtio_rng")


@dataclass(frozen=True)
class LinuxImage:
    """A bootable pair of files, and the version of the kernel in them."""

    kernel: Path
    initramfs: Path
    version: str


def cache_directory() -> Path:
    """Where images are kept between runs: $VIADUCT_CACHE, else ~/.cache/viaduct."""
    return Path(os.environ.get("VIADUCT_CACHE") or Path.home() / ".cache" / "viaduct")


def linux_image(
    sources: tuple[Path, ...] = (),
    build: Callable[[Path], dict[str, bytes]] | None = None,
    modules: tuple[str, ...] = MODULES,
) -> LinuxImage:
    """The image from the cache, made first if it is not there.

    `build` adds files, by their path in the guest, and may work in the directory it is given; `sources` are the files
    it makes them of; `modules` are the drivers that are loaded. Raises LinuxImageError when a tool or package is
    missing.
    """
    busybox = _static_busybox()
    key = hashlib.sha256(" ".join(modules).encode())
    for source in (*(HERE / name for name in SOURCES), busybox, *sources):
        key.update(source.read_bytes())
    installed = installed_kernel()
    key.update((installed or "downloaded").encode())
    directory = cache_directory() / f"guest-{key.hexdigest()[:16]}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix="making-") as scratch:
            made = Path(scratch) / "image"
            files = build(Path(scratch)) if build else {}
            _make(made, Path(scratch), installed, busybox, files, modules)
            try:
                made.rename(directory)
            except OSError:  # another run made it in the meantime
                if not directory.exists():
                    raise
    return LinuxImage(directory / "kernel", directory / "initramfs", (directory / "version").read_text())


def _static_busybox() -> Path:
    found = shutil.which("busybox")
    if found is None or _has_interpreter(Path(found).read_bytes()):
        raise LinuxImageError("no static busybox for the guests: apt-get install busybox-static")
    return Path(found)


def _has_interpreter(program: bytes) -> bool:
    """Whether an ELF64 file names a dynamic loader: a program header of type PT_INTERP (3)."""
    table, size, count = (
        int.from_bytes(program[at : at + width], "little") for at, width in ((32, 8), (54, 2), (56, 2))
    )
    headers = (program[table + index * size : table + index * size + 4] for index in range(count))
    return any(int.from_bytes(header, "little") == 3 for header in headers)


def _make(
    to: Path, scratch: Path, installed: str | None, busybox: Path, more: dict[str, bytes], modules: tuple[str, ...]
) -> None:
    root = Path("/") if installed else downloaded_kernel(scratch)
    version = installed or next((root / "lib/modules").iterdir()).name
    to.mkdir()
    (to / "kernel").write_bytes(uncompressed((root / f"boot/vmlinuz-{version}").read_bytes()))
    (to / "version").write_text(version)
    files = {"init": (HERE / "init.sh").read_bytes(), "bin/busybox": busybox.read_bytes(), **more}
    order = with_dependencies(root / "lib/modules" / version, modules)
    for module in order:
        files[f"modules/{plain_name(module)}"] = read_module(module)
    files["modules/order"] = "".join(f"{plain_name(module)}\n" for module in order).encode()
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    links = {f"bin/{applet}": "busybox" for applet in applets if applet != "busybox"}
    (to / "initramfs").write_bytes(initramfs(files, links))
