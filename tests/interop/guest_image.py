"""The image that the test guests boot: the package's small Linux, and the program `transfer` in it."""

from __future__ import annotations

from pathlib import Path

from viaduct.qemu.linux_image import LinuxImage as GuestImage
from viaduct.qemu.linux_image import linux_image
from viaduct.qemu.linux_kernel import LinuxImageError as GuestImageError
from viaduct.qemu.linux_kernel import run

__all__ = ["GuestImage", "GuestImageError", "guest_image"]

TRANSFER = Path(__file__).parent / "transfer.c"


def guest_image() -> GuestImage:
    """The image from the cache, made first if it is not there.

    Raises GuestImageError when a tool or package is missing.
    """

    def build(scratch: Path) -> dict[str, bytes]:
        program = scratch / "transfer"
        run(["gcc", "-O2", "-static", "-o", str(program), str(TRANSFER)], "gcc libc6-dev")
        return {"bin/transfer": program.read_bytes()}

    return linux_image((TRANSFER,), build)
