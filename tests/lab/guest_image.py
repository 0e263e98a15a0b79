"""What the guests in the lab boot: the distribution's stock kernel in both its forms, and a small initramfs.

The initramfs has busybox, the program `transfer` of the interoperability tests, and the drivers that a guest of ours
or of QEMU may need; a device gets its driver by the alias it shows, as in an installed system.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from viaduct.qemu.initramfs import __file__ as initramfs_file
from viaduct.qemu.initramfs import initramfs
from viaduct.qemu.linux_kernel import __file__ as kernel_file
from viaduct.qemu.linux_kernel import plain_name, read_module, run, uncompressed, with_dependencies

from .tree import Tree

HERE = Path(__file__).parent
TRANSFER = HERE.parent / "interop" / "transfer.c"
SOURCES = (Path(__file__), HERE / "guest_init.sh", TRANSFER, Path(initramfs_file), Path(kernel_file))
DIRECTORY = "guest"
"""Below the tree's root: `bzImage`, `vmlinux`, `initramfs`, `version`, and `transfer` for the lab itself."""
MODULES = (
    "virtio_mmio", "virtio_pci", "virtio_net", "virtio_blk", "virtio_rng", "virtio_balloon", "virtio_console",
    "vmw_vsock_virtio_transport", "9p", "9pnet_virtio", "virtiofs", "virtio_iommu", "erofs", "overlay",
    "e1000", "8139cp", "8139too", "pvpanic_mmio", "pvpanic_pci", "rtc_cmos", "i8042", "ext4", "crc32c_generic",
    "af_packet",
)  # fmt: skip


def make(tree: Tree, kernel: Path, modules: Path, scratch: Path) -> None:
    """Add the guests' files to the tree. `modules` is the directory of the kernel's modules, not yet unpacked ones."""
    to = tree.path / DIRECTORY
    to.mkdir()
    image = kernel.read_bytes()
    (to / "bzImage").write_bytes(image)
    (to / "vmlinux").write_bytes(uncompressed(image))
    (to / "version").write_text(modules.name)
    run(["gcc", "-O2", "-static", "-o", str(to / "transfer"), str(TRANSFER)], "gcc libc6-dev")
    (to / "initramfs").write_bytes(_initramfs(tree, modules, scratch))


def _initramfs(tree: Tree, modules: Path, scratch: Path) -> bytes:
    busybox = tree.path / "usr/bin/busybox"
    files = {
        "init": (HERE / "guest_init.sh").read_bytes(),
        "bin/busybox": busybox.read_bytes(),
        "bin/transfer": (tree.path / DIRECTORY / "transfer").read_bytes(),
    }
    lib = scratch / "guest" / "lib/modules" / modules.name
    install(modules, MODULES, lib)
    tree.run("usr/sbin/depmod", "-b", scratch / "guest", modules.name)
    for file in lib.iterdir():
        if file.suffix in (".ko", ".dep", ".alias"):
            files[f"lib/modules/{modules.name}/{file.name}"] = file.read_bytes()
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    links = {f"bin/{applet}": "busybox" for applet in applets if applet != "busybox"}
    return initramfs(files, links)


def install(modules: Path, names: tuple[str, ...], to: Path) -> list[str]:
    """Copy modules with all that they need, ready to be loaded, and return their files' names in order of loading."""
    to.mkdir(parents=True, exist_ok=True)
    order = with_dependencies(modules, names)
    for module in order:
        (to / plain_name(module)).write_bytes(read_module(module))
    return [plain_name(module) for module in order]
