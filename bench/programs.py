"""Builds the benchmark's two C programs into a cache outside the repository, once for each version of their source."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent


class BuildError(RuntimeError):
    """A tool is missing or a program did not compile."""


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "viaduct" / "bench"


def _compile(name: str, sources: list[str], flags: list[str]) -> Path:
    digest = hashlib.sha256("\0".join(flags).encode())
    for source in sources:
        digest.update((SOURCES / source).read_bytes())
    program = _cache() / f"{name}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BuildError("no C compiler: apt-get install gcc")
    program.parent.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_suffix(f".{os.getpid()}")
    command = [
        compiler,
        "-std=gnu11",
        "-O3",
        "-Wall",
        "-Wextra",
        "-o",
        str(unfinished),
        str(SOURCES / sources[0]),
        *flags,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stderr}")
    unfinished.rename(program)
    return program


def generator() -> Path:
    """The traffic generator; needs DPDK's development files."""
    found = subprocess.run(["pkg-config", "--cflags", "--libs", "libdpdk"], capture_output=True, text=True)
    if found.returncode:
        raise BuildError(f"DPDK's development files are missing: apt-get install libdpdk-dev\n{found.stderr}")
    flags = ["-march=native", *found.stdout.split(), "-lrte_bus_vdev"]
    return _compile("generator", ["generator.c", "frames.h", "latency.h"], flags)


def placement() -> Path:
    """The probe of the distance between two CPUs."""
    return _compile("placement", ["placement.c"], ["-pthread"])
