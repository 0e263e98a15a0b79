"""A QEMU that can carry any vhost-user device: that of the lab, with its generic front-end made available."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lab.image import lab_image
from lab.packages import LabError

from interop.peer_process import PeerError
from viaduct.qemu.linux_kernel import run

PLUGIN = Path(__file__).parent / "generic_vhost_user.c"
MODEL = "vhost-user-device-pci"


@cache
def generic_qemu(directory: Path) -> tuple[str, ...]:
    """The beginning of its command line; what has to be compiled goes into `directory`.

    Raises PeerError if it cannot be had.
    """
    try:
        tree = lab_image().tree
    except LabError as error:
        raise PeerError(str(error)) from error
    plugin = directory / "generic_vhost_user.so"
    run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(plugin), str(PLUGIN)], "gcc libc6-dev")
    firmware = [word for name in ("qemu", "seabios") for word in ("-L", str(tree.path / "usr/share" / name))]
    return (*tree.command("usr/bin/qemu-system-x86_64"), *firmware, "-plugin", f"file={plugin}")
