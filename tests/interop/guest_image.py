"""The kernel and the initramfs that the test guests boot: Debian's kernel and drivers, busybox and `transfer`.

Nothing is installed. The kernel is the one in /boot if its modules are there as well, else the package that Debian's
meta package names, downloaded and unpacked. What is made of it is kept in $VIADUCT_CACHE (~/.cache/viaduct), under a
name that changes with everything that goes into it. Two things make the boot quicker in software emulation: the
kernel is uncompressed here, once, and started through its PVH entry; modules lose their signature, whose check costs
a guest a noticeable time for each of them.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
MODULES = ("virtio_pci", "virtio_net", "virtio_rng")
META_PACKAGES = ("linux-image-amd64", "linux-image-virtual")  # Debian's, Ubuntu's
DIRECTORIES = ("bin", "dev", "proc", "sys", "tmp", "modules")
SIGNATURE = b"~Module signature appended~\n"


class GuestImageError(Exception):
    """The image cannot be made here; the message says what to install or run."""


@dataclass(frozen=True)
class GuestImage:
    """A bootable pair of files, and the version of the kernel in them."""

    kernel: Path
    initramfs: Path
    version: str


def cache_directory() -> Path:
    """Where images are kept between runs: $VIADUCT_CACHE, else ~/.cache/viaduct."""
    return Path(os.environ.get("VIADUCT_CACHE") or Path.home() / ".cache" / "viaduct")


def guest_image() -> GuestImage:
    """The image from the cache, made first if it is not there.

    Raises GuestImageError when a tool or package is missing.
    """
    busybox = _static_busybox()
    key = hashlib.sha256()
    for source in (HERE / "guest_init.sh", HERE / "transfer.c", Path(__file__), busybox):
        key.update(source.read_bytes())
    installed = _installed_kernel()
    key.update((installed or "downloaded").encode())
    directory = cache_directory() / f"guest-{key.hexdigest()[:16]}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix="making-") as scratch:
            made = Path(scratch) / "image"
            _make(made, Path(scratch), installed, busybox)
            try:
                made.rename(directory)
            except OSError:  # another run made it in the meantime
                if not directory.exists():
                    raise
    return GuestImage(directory / "kernel", directory / "initramfs", (directory / "version").read_text())


def _static_busybox() -> Path:
    found = shutil.which("busybox")
    if found is None or _has_interpreter(Path(found).read_bytes()):
        raise GuestImageError("no static busybox for the guests: apt-get install busybox-static")
    return Path(found)


def _has_interpreter(program: bytes) -> bool:
    """Whether an ELF64 file names a dynamic loader: a program header of type PT_INTERP (3)."""
    table, size, count = (
        int.from_bytes(program[at : at + width], "little") for at, width in ((32, 8), (54, 2), (56, 2))
    )
    headers = (program[table + index * size : table + index * size + 4] for index in range(count))
    return any(int.from_bytes(header, "little") == 3 for header in headers)


def _installed_kernel() -> str | None:
    """The newest version whose kernel in /boot can be read and whose modules are installed."""
    versions = [
        kernel.name.removeprefix("vmlinuz-")
        for kernel in Path("/boot").glob("vmlinuz-*")
        if os.access(kernel, os.R_OK) and Path("/lib/modules", kernel.name.removeprefix("vmlinuz-"), "kernel").is_dir()
    ]
    return max(versions, key=lambda version: [int(number) for number in re.findall(r"\d+", version)], default=None)


def _make(to: Path, scratch: Path, installed: str | None, busybox: Path) -> None:
    root = Path("/") if installed else _downloaded_kernel(scratch)
    version = installed or next((root / "lib/modules").iterdir()).name
    to.mkdir()
    (to / "kernel").write_bytes(_uncompressed((root / f"boot/vmlinuz-{version}").read_bytes()))
    (to / "version").write_text(version)
    transfer = scratch / "transfer"
    _run(["gcc", "-O2", "-static", "-o", str(transfer), str(HERE / "transfer.c")], "gcc libc6-dev")
    files = {
        "init": (HERE / "guest_init.sh").read_bytes(),
        "bin/busybox": busybox.read_bytes(),
        "bin/transfer": transfer.read_bytes(),
    }
    order = _with_dependencies(root / "lib/modules" / version)
    for module in order:
        files[f"modules/{_plain_name(module)}"] = _module(module)
    files["modules/order"] = "".join(f"{_plain_name(module)}\n" for module in order).encode()
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    links = {f"bin/{applet}": "busybox" for applet in applets if applet != "busybox"}
    (to / "initramfs").write_bytes(_cpio(files, links))


def _downloaded_kernel(scratch: Path) -> Path:
    """Download the kernel that the distribution's meta package names, and unpack it below `scratch`."""
    packages = scratch / "packages"
    packages.mkdir()
    meta = next((name for name in META_PACKAGES if _depends(name) is not None), None)
    if meta is None:
        raise GuestImageError(f"apt knows none of {', '.join(META_PACKAGES)} for the guests' kernel: apt-get update")
    wanted, seen = _kernel_names(_depends(meta) or ""), set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name]
        _run(command, "apt", cwd=packages)
        wanted |= _kernel_names(_depends(name) or "")
    root = scratch / "root"
    for package in packages.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(root)], "dpkg")
    if not (root / "lib").exists():  # packages for a merged /usr
        (root / "lib").symlink_to("usr/lib")
    return root


def _depends(package: str) -> str | None:
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", package], capture_output=True, text=True)
    found = re.search(r"^Depends: (.*)$", shown.stdout, re.MULTILINE)
    return (found[1] if found else "") if shown.returncode == 0 and shown.stdout else None


def _kernel_names(depends: str) -> set[str]:
    return set(re.findall(r"\blinux-(?:image|modules)-\d[^\s,|]*", depends))


def _run(command: list[str], package: str, cwd: Path | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise GuestImageError(f"no {command[0]} here to make the guests' image: apt-get install {package}")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise GuestImageError(f"{' '.join(command)} left with status {done.returncode}: {done.stderr.strip()}")


def _uncompressed(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage, or the bzImage itself where its compression is not one that Python knows.

    The offsets are those of the x86 boot protocol's header: setup_sects, payload_offset, payload_length.
    """
    start = ((image[0x1F1] or 4) + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    payload = image[start : start + int.from_bytes(image[0x24C:0x250], "little")]
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    return image


def _plain_name(module: Path) -> str:
    return module.name.split(".ko")[0] + ".ko"


def _with_dependencies(modules: Path) -> list[Path]:
    """Files of MODULES and of all that they need, dependencies first. A driver built into the kernel has no file."""
    files = {_plain_name(file)[:-3].replace("-", "_"): file for file in modules.rglob("*.ko*")}
    order: list[Path] = []

    def visit(name: str) -> None:
        file = files.get(name)
        if file is None or file in order:
            return
        needs = re.search(rb"\0depends=([^\0]*)\0", b"\0" + _module(file))
        for needed in (needs[1].decode() if needs else "").split(","):
            visit(needed.replace("-", "_"))
        order.append(file)

    for name in MODULES:
        visit(name)
    return order


def _module(file: Path) -> bytes:
    """A module, uncompressed and without the signature at its end."""
    content = file.read_bytes()
    if file.suffix == ".xz":
        content = lzma.decompress(content)
    elif file.suffix == ".zst":
        if shutil.which("zstd") is None:
            raise GuestImageError(f"no zstd here to unpack {file.name}: apt-get install zstd")
        content = subprocess.run(["zstd", "-dcq", str(file)], capture_output=True, check=True).stdout
    if content.endswith(SIGNATURE):
        length = int.from_bytes(content[-len(SIGNATURE) - 4 : -len(SIGNATURE)], "big")
        content = content[: -len(SIGNATURE) - 12 - length]
    return content


def _cpio(files: dict[str, bytes], links: dict[str, str]) -> bytes:
    """An archive in the "newc" form that the kernel unpacks as its first root."""
    archive = bytearray()

    def add(name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0")
        archive.extend(bytes(-len(archive) % 4))
        archive.extend(content)
        archive.extend(bytes(-len(archive) % 4))

    for name in DIRECTORIES:
        add(name, stat.S_IFDIR | 0o755, b"")
    add("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))
    for name, content in files.items():
        add(name, stat.S_IFREG | 0o755, content)
    for name, target in links.items():
        add(name, stat.S_IFLNK | 0o777, target.encode())
    add("TRAILER!!!", 0, b"")
    return bytes(archive)
