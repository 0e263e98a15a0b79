"""The kernel that guests boot, and its modules: the distribution's own, not installed.

The kernel in /boot serves if its modules are there as well; else the package that the distribution's meta package names
is downloaded and unpacked. Two things make the boot quicker in software emulation: the kernel is uncompressed here,
once, and started through its PVH entry; modules lose their signature, whose check costs a guest a noticeable time for
each.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path

META_PACKAGES = ("linux-image-amd64", "linux-image-virtual")  # Debian's, Ubuntu's
SIGNATURE = b"~Module signature appended~\n"


class LinuxImageError(Exception):
    """The image cannot be made here; the message says what to install or run."""


def installed_kernel() -> str | None:
    """The newest version whose kernel in /boot can be read and whose modules are installed."""
    versions = [
        kernel.name.removeprefix("vmlinuz-")
        for kernel in Path("/boot").glob("vmlinuz-*")
        if os.access(kernel, os.R_OK) and Path("/lib/modules", kernel.name.removeprefix("vmlinuz-"), "kernel").is_dir()
    ]
    return max(versions, key=lambda version: [int(number) for number in re.findall(r"\d+", version)], default=None)


def downloaded_kernel(scratch: Path) -> Path:
    """Download the kernel that the distribution's meta package names, and unpack it below `scratch`."""
    packages = scratch / "packages"
    packages.mkdir()
    meta = next((name for name in META_PACKAGES if _depends(name) is not None), None)
    if meta is None:
        raise LinuxImageError(f"apt knows none of {', '.join(META_PACKAGES)} for the guests' kernel: apt-get update")
    wanted, seen = _kernel_names(_depends(meta) or ""), set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name]
        run(command, "apt", cwd=packages)
        wanted |= _kernel_names(_depends(name) or "")
    root = scratch / "root"
    for package in packages.glob("*.deb"):
        run(["dpkg-deb", "-x", str(package), str(root)], "dpkg")
    if not (root / "lib").exists():  # packages for a merged /usr
        (root / "lib").symlink_to("usr/lib")
    return root


def _depends(package: str) -> str | None:
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", package], capture_output=True, text=True)
    found = re.search(r"^Depends: (.*)$", shown.stdout, re.MULTILINE)
    return (found[1] if found else "") if shown.returncode == 0 and shown.stdout else None


def _kernel_names(depends: str) -> set[str]:
    return set(re.findall(r"\blinux-(?:image|modules)-\d[^\s,|]*", depends))


def run(command: list[str], package: str, cwd: Path | None = None) -> None:
    """Run a tool that `package` has. Raises LinuxImageError if it is missing or fails."""
    if shutil.which(command[0]) is None:
        raise LinuxImageError(f"no {command[0]} here to make the guests' image: apt-get install {package}")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise LinuxImageError(f"{' '.join(command)} left with status {done.returncode}: {done.stderr.strip()}")


def uncompressed(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage, or the bzImage itself where its compression is neither xz nor zstd.

    The offsets are those of the x86 boot protocol's header: setup_sects, payload_offset, payload_length. Behind the
    compressed kernel the payload ends with four bytes that tell its size.
    """
    start = ((image[0x1F1] or 4) + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    payload = image[start : start + int.from_bytes(image[0x24C:0x250], "little")]
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd(payload[:-4], "the kernel")
    return image


def _zstd(content: bytes, what: str) -> bytes:
    if shutil.which("zstd") is None:
        raise LinuxImageError(f"no zstd here to unpack {what}: apt-get install zstd")
    return subprocess.run(["zstd", "-dcq"], input=content, capture_output=True, check=True).stdout


def plain_name(module: Path) -> str:
    """The name of a module's file without its compression's suffix."""
    return module.name.split(".ko")[0] + ".ko"


def with_dependencies(modules: Path, wanted: tuple[str, ...]) -> list[Path]:
    """Files of the wanted modules and of all that they need, dependencies first. What is built in has no file."""
    files = {plain_name(file)[:-3].replace("-", "_"): file for file in modules.rglob("*.ko*")}
    order: list[Path] = []

    def visit(name: str) -> None:
        file = files.get(name)
        if file is None or file in order:
            return
        needs = re.search(rb"\0depends=([^\0]*)\0", b"\0" + read_module(file))
        for needed in (needs[1].decode() if needs else "").split(","):
            visit(needed.replace("-", "_"))
        order.append(file)

    for name in wanted:
        visit(name)
    return order


def read_module(file: Path) -> bytes:
    """A module, uncompressed and without the signature at its end."""
    content = file.read_bytes()
    if file.suffix == ".xz":
        content = lzma.decompress(content)
    elif file.suffix == ".zst":
        content = _zstd(content, file.name)
    if content.endswith(SIGNATURE):
        length = int.from_bytes(content[-len(SIGNATURE) - 4 : -len(SIGNATURE)], "big")
        content = content[: -len(SIGNATURE) - 12 - length]
    return content
