"""The images that the test guests boot: the package's small Linux, with programs for the tests in it."""

from __future__ import annotations

from pathlib import Path

from viaduct.qemu.linux_image import MODULES, linux_image
from viaduct.qemu.linux_image import LinuxImage as GuestImage
from viaduct.qemu.linux_kernel import LinuxImageError as GuestImageError
from viaduct.qemu.linux_kernel import run

__all__ = ["GuestImage", "GuestImageError", "device_guest_image", "guest_image"]

TRANSFER = Path(__file__).parent / "transfer.c"
DEVICE_PROGRAMS = tuple(Path(__file__).parent / f"{name}.c" for name in ("vsock", "disk_work"))
DEVICE_MODULES = (
    *MODULES,
    *("virtio_console", "virtio_balloon", "vmw_vsock_virtio_transport", "virtiofs"),
    *("virtio_blk", "ext4", "crc32c_generic"),
)


def guest_image() -> GuestImage:
    """The image from the cache, made first if it is not there.

    Raises GuestImageError when a tool or package is missing.
    """

    def build(scratch: Path) -> dict[str, bytes]:
        program = scratch / "transfer"
        run(["gcc", "-O2", "-static", "-o", str(program), str(TRANSFER)], "gcc libc6-dev")
        return {"bin/transfer": program.read_bytes()}

    return linux_image((TRANSFER,), build)


def device_guest_image() -> GuestImage:
    """The same with the drivers of more devices, and the programs `vsock`, which is a pipe through one of its sockets,
    and `disk_work`, whose writes to a disk can be checked.

    Raises GuestImageError when a tool or package is missing.
    """

    def build(scratch: Path) -> dict[str, bytes]:
        files = {}
        for source in DEVICE_PROGRAMS:
            program = scratch / source.stem
            run(["gcc", "-O2", "-static", "-o", str(program), str(source)], "gcc libc6-dev")
            files[f"bin/{source.stem}"] = program.read_bytes()
        return files

    return linux_image(DEVICE_PROGRAMS, build, DEVICE_MODULES)
