"""The images that the test guests boot: the package's small Linux, with programs for the tests in it."""

from __future__ import annotations

from pathlib import Path

from viaduct.qemu.linux_image import MODULES, linux_image
from viaduct.qemu.linux_image import LinuxImage as GuestImage
from viaduct.qemu.linux_kernel import LinuxImageError as GuestImageError
from viaduct.qemu.linux_kernel import run

__all__ = ["GuestImage", "GuestImageError", "device_guest_image", "guest_image"]

TRANSFER = Path(__file__).parent / "transfer.c"
VSOCK = Path(__file__).parent / "vsock.c"
DEVICE_MODULES = (*MODULES, "virtio_console", "virtio_balloon", "vmw_vsock_virtio_transport", "virtiofs")


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
    """The same with the drivers of more devices, and the program `vsock`, which is a pipe through one of its sockets.

    Raises GuestImageError when a tool or package is missing.
    """

    def build(scratch: Path) -> dict[str, bytes]:
        program = scratch / "vsock"
        run(["gcc", "-O2", "-static", "-o", str(program), str(VSOCK)], "gcc libc6-dev")
        return {"bin/vsock": program.read_bytes()}

    return linux_image((VSOCK,), build, DEVICE_MODULES)
