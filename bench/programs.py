"""The benchmark's programs: those in C, kept in a cache outside the repository, and those in Rust, built by cargo."""

import hashlib
import json
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
    options = ["-std=gnu11", "-O3", "-Wall", "-Wextra"]
    command = [compiler, *options, "-o", str(unfinished), str(SOURCES / sources[0]), *flags]
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


def stream() -> Path:
    """The two ends of a TCP stream, for guests and for the host."""
    return _compile("stream", ["stream.c"], ["-static"])


def example(name: str) -> Path:
    """One of the example programs in crates/switch, built for release."""
    command = ["cargo", "build", "--release", "--quiet", "--package", "viaduct-switch", "--example", name]
    if shutil.which(command[0]) is None:
        raise BuildError("cargo is missing: run this through make")
    done = subprocess.run([*command, "--message-format=json"], cwd=SOURCES.parent, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message.get("executable"):
            return Path(message["executable"])
    raise BuildError(f"{' '.join(command)}\n{done.stderr}")
