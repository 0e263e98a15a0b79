"""This repository as the lab sees it: a read-only disk with the package, its tests and benchmarks, compiled.

A disk and no shared directory, because a directory costs an emulated machine an exit for each look, and Python looks
often. The extension module is the host's: it is built for the stable ABI, so it fits any Python that is new enough.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .image import CHECKOUT, LabImage, compile_python
from .packages import LabError

PARTS = ("python", "tests", "bench", "examples")
COMPILED = ("python", "tests/lab")


def make_checkout(image: LabImage, scratch: Path) -> Path:
    """The disk, in `scratch`. Raises LabError if the extension module has not been built."""
    if not list((CHECKOUT / "python/viaduct").glob("_core*.so")):
        raise LabError("the extension module is not built, and the lab runs what is: make dev")
    copy = scratch / "checkout"
    for part in PARTS:
        shutil.copytree(CHECKOUT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(CHECKOUT / "pyproject.toml", copy)
    compile_python(image.tree, *(copy / part for part in COMPILED))
    disk = scratch / "checkout.erofs"
    image.tree.run("usr/bin/mkfs.erofs", "--quiet", "-x-1", "--all-root", disk, copy)
    shutil.rmtree(copy)
    return disk
