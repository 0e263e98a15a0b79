"""The files that the lab boots, made once and kept: its kernel, its initramfs, its root image, and the tree behind it.

They are kept in $VIADUCT_LAB_CACHE (~/.cache/viaduct-lab) under a name that changes with everything that they are made
of, except for the packages' versions: whoever wants newer packages removes the directory.
Three things make the lab boot in seconds without hardware virtualization: the kernel is unpacked here and started by
its PVH entry; its modules lose their signatures and their compression here; all Python is compiled here, by the Python
of the lab, which runs on this host as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from viaduct.qemu.initramfs import initramfs
from viaduct.qemu.linux_kernel import LinuxImageError, uncompressed

from . import guest_image
from .packages import CODENAMES_WITH_BACKPORTS, LabError, Packages, codename
from .tree import Tree

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
KERNELS = {"debian": "linux-image-amd64", "ubuntu": "linux-image-generic"}
PACKAGES = (
    "base-files", "bash", "dash", "debianutils", "coreutils", "findutils", "grep", "sed", "mawk", "tar", "less",
    "mount", "util-linux", "procps", "kmod", "busybox-static", "iproute2", "iputils-ping", "ethtool", "pciutils",
    "tcpdump", "strace", "gdb", "fio", "socat", "python3", "qemu-system-x86", "qemu-utils", "erofs-utils",
    "libcap-ng0", "libseccomp2",
)  # fmt: skip
VIRTIOFSD = "virtiofsd"
"""A package of its own from Debian 13 and Ubuntu 24.04 on; before that a program of QEMU's."""
BOOT_MODULES = ("crc32c_generic", "virtio_blk", "erofs", "overlay")
RUN_MODULES = (
    "kvm_amd", "vhost_net", "vhost_vsock", "tun", "tap", "9p", "9pnet_virtio", "qemu_fw_cfg", "virtio_rng",
)  # fmt: skip
MORE_MODULES = (
    "igb", "igbvf", "e1000e", "veth", "bridge", "macvtap", "dummy", "af_packet", "vfio_pci", "vfio_iommu_type1",
    "uio", "uio_pci_generic", "loop", "ext4", "crc32c_generic", "virtiofs", "null_blk", "nbd", "msr",
    "nf_tables", "xt_MASQUERADE", "sch_netem", "sch_ingress", "vhost_vdpa", "vdpa_sim_net",
)  # fmt: skip
"""Loaded when the lab starts; and there for tests to load."""
TEST_PACKAGES = ("pytest", "pytest-asyncio", "pytest-timeout")
ACCOUNTS = "root:x:0:0::/root:/bin/bash\nnobody:x:65534:65534::/nonexistent:/bin/false\n"
GROUPS = "root:x:0:\ntty:x:5:\nkvm:x:36:\nnogroup:x:65534:\n"
VIADUCT = """#!/usr/bin/python3
from viaduct.cli import main

main()
"""


@dataclass(frozen=True)
class LabImage:
    """What QEMU boots, and the tree with the QEMU that boots it."""

    kernel: Path
    initramfs: Path
    root: Path
    tree: Tree


def cache_directory() -> Path:
    """Where images and packages are kept: $VIADUCT_LAB_CACHE, else ~/.cache/viaduct-lab."""
    return Path(os.environ.get("VIADUCT_LAB_CACHE") or Path.home() / ".cache" / "viaduct-lab")


def lab_image() -> LabImage:
    """The image from the cache, made first if it is not there. Raises LabError if it cannot be made."""
    directory = cache_directory() / f"image-{_key()}"
    if not directory.exists():
        cache_directory().mkdir(parents=True, exist_ok=True)
        with _alone():
            if not directory.exists():
                print(
                    f"lab: making its images in {directory} (once; a download of 250 MB)", file=sys.stderr, flush=True
                )
                with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="making-") as scratch:
                    to = Path(scratch) / "image"
                    to.mkdir()
                    try:
                        _make(to, Path(scratch))
                    except LinuxImageError as error:
                        raise LabError(str(error)) from None
                    to.rename(directory)
    return LabImage(directory / "vmlinux", directory / "initramfs", directory / "root.erofs", Tree(directory / "tree"))


def requirements() -> list[str]:
    """The package's own dependencies, and those of its tests that run in the lab, from pyproject.toml."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    tests = [line for line in project["optional-dependencies"]["dev"] if line.split(">")[0] in TEST_PACKAGES]
    return [*project["dependencies"], *tests]


def _key() -> str:
    key = hashlib.sha256(f"{codename()} {requirements()}".encode())
    sources = ("image.py", "packages.py", "tree.py", "initramfs_init.sh", "lab_init.sh")
    for source in (*(HERE / name for name in sources), *guest_image.SOURCES):
        key.update(source.read_bytes())
    return key.hexdigest()[:16]


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time makes images and uses apt's directory."""
    with (cache_directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(to: Path, scratch: Path) -> None:
    tree = Tree(to / "tree")
    archive = Packages(cache_directory() / "apt")
    with_backports = codename() in CODENAMES_WITH_BACKPORTS
    packages = archive.download([*PACKAGES, _kernel_package(), *([] if with_backports else [VIRTIOFSD])])
    tree.unpack(packages)
    if with_backports:
        older_qemu = archive.download_one("qemu-system-common", codename())
        tree.unpack_parts(older_qemu, [f"./usr/lib/qemu/{VIRTIOFSD}"])
    kernel, modules = _kernel(packages, scratch / "kernel")
    (to / "vmlinux").write_bytes(uncompressed(kernel.read_bytes()))
    guest_image.make(tree, kernel, modules, scratch)
    _add_modules(tree, modules)
    _add_python(tree)
    _write(tree, "etc/passwd", ACCOUNTS)
    _write(tree, "etc/group", GROUPS)
    _write(tree, "etc/hosts", "127.0.0.1 localhost lab\n::1 localhost\n")
    _write(tree, "etc/lab-modules", "\n".join(RUN_MODULES))
    _write(tree, "usr/sbin/lab-init", (HERE / "lab_init.sh").read_text(), 0o755)
    for directory in ("dev", "proc", "sys", "tmp", "run", "root", "viaduct"):
        (tree.path / directory).mkdir(exist_ok=True)
    (to / "initramfs").write_bytes(_lab_initramfs(tree, modules, scratch / "boot"))
    tree.run("usr/bin/mkfs.erofs", "--quiet", "-x-1", "--all-root", to / "root.erofs", tree.path)


def _kernel_package() -> str:
    system = platform.freedesktop_os_release()
    names = [system.get("ID", ""), *system.get("ID_LIKE", "").split()]
    found = next((KERNELS[name] for name in names if name in KERNELS), None)
    if found is None:
        raise LabError(f"no kernel package is known for {names[0]}; the lab knows {', '.join(KERNELS)}")
    return found


def _kernel(packages: list[Path], scratch: Path) -> tuple[Path, Path]:
    """The kernel and its modules, unpacked aside: the lab gets few of them."""
    scratch.mkdir()
    aside = Tree(scratch)
    for package in packages:
        if package.name.startswith(("linux-image-", "linux-modules-")):
            aside.unpack_parts(package, [])
    kernel = next((scratch / "boot").glob("vmlinuz-*"))
    version = kernel.name.removeprefix("vmlinuz-")
    directory = next(scratch.glob(f"**/lib/modules/{version}"))
    return kernel, directory


def _add_modules(tree: Tree, modules: Path) -> None:
    to = tree.path / "usr/lib/modules" / modules.name
    guest_image.install(modules, (*BOOT_MODULES, *RUN_MODULES, *MORE_MODULES), to)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        (to / name).write_bytes((modules / name).read_bytes())
    tree.run("usr/sbin/depmod", "-b", tree.path, modules.name)


def _add_python(tree: Tree) -> None:
    version = tree.python.rpartition("python")[2]
    packages = tree.path / f"usr/local/lib/python{version}/dist-packages"
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(packages),
        "--python-version", version, "--implementation", "cp", "--only-binary=:all:",
        "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64", *requirements(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"the lab's Python packages were not installed: {' '.join(command)}\n{done.stderr}")
    _write(tree, f"{packages.relative_to(tree.path)}/viaduct.pth", "/viaduct/python\n/viaduct/tests\n")
    _write(tree, "usr/local/bin/viaduct", VIADUCT, 0o755)
    compile_python(tree, packages, tree.path / f"usr/lib/python{version}", tree.path / "usr/lib/python3")


def compile_python(tree: Tree, *directories: Path) -> None:
    """Compile Python files for the lab, whatever the lab later thinks of their times."""
    options = ["-q", "-q", "-j", "0", "-x", "/(test|tests|lib2to3)/", "--invalidation-mode", "unchecked-hash"]
    tree.run(tree.python, "-I", "-m", "compileall", *options, *directories)


def _write(tree: Tree, path: str, text: str, mode: int = 0o644) -> None:
    file = tree.path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


def _lab_initramfs(tree: Tree, modules: Path, scratch: Path) -> bytes:
    order = guest_image.install(modules, BOOT_MODULES, scratch)
    files = {f"modules/{name}": (scratch / name).read_bytes() for name in order}
    files["modules/order"] = "".join(f"{name}\n" for name in order).encode()
    files["init"] = (HERE / "initramfs_init.sh").read_bytes()
    files["bin/busybox"] = (tree.path / "usr/bin/busybox").read_bytes()
    return initramfs(files, {})
