"""Instructions per packet: a guard against slow growth that does not wander with the machine.

`python -m bench.instructions` forwards frames in a program of its own (crates/switch/examples/forward.rs) under
Valgrind, which counts the instructions of the forwarding function and all it calls, and compares with the figures kept
in bench/results/instructions.json: it fails where one has grown by more than 5 %. `--update` keeps the new figures.

Each figure is the difference between a long and a short run divided by the difference in frames, so that starting up
does not count. Cycles are another matter (most of a packet's time goes into cache lines that the other core has just
written), but what is not executed cannot become slow.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from bench.report import RESULTS

GROWTH_ALLOWED = 0.05
_STORE = RESULTS / "instructions.json"
_ROOT = Path(__file__).parent.parent
_PROGRAM = _ROOT / "target" / "release" / "examples" / "forward"
_COUNTED = "*Forwarder::forward*"
_FRAMES = (6_400, 25_600)

CASES = {
    f"{layout}, {size} B{''.join(', ' + word for word in extra)}": (layout, str(size), extra)
    for layout in ("split", "packed")
    for size, extra in ((64, ()), (1500, ()), (64, ("scattered",)), (64, ("macs=256",)))
}
"""The program's arguments by what they mean: ring layout, frame size, and either header and frame in buffers of their
own, or that many source addresses."""


class Counts(msgspec.Struct, frozen=True):
    """Instructions for each frame by case, and the compiler that made them."""

    compiler: str
    instructions: dict[str, float]


class CountError(RuntimeError):
    """A tool is missing, or the counted program failed."""


def _run(*command: str) -> str:
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if result.returncode:
        raise CountError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def _total(layout: str, size: str, extra: tuple[str, ...], frames: int) -> int:
    """Instructions of the forwarding function in one run."""
    with tempfile.TemporaryDirectory(prefix="viaduct-bench-") as directory:
        output = Path(directory) / "count"
        options = ["--tool=callgrind", f"--toggle-collect={_COUNTED}", f"--callgrind-out-file={output}"]
        _run("valgrind", "-q", *options, str(_PROGRAM), layout, size, str(frames), *extra)
        counted = output.read_text()
    found = re.search(r"^totals: (\d+)", counted, re.MULTILINE)
    if not found or int(found[1]) == 0:
        raise CountError(f"callgrind has not seen the function {_COUNTED}")
    return int(found[1])


def count() -> Counts:
    """Build the program and count every case. Raises CountError."""
    for tool in ("cargo", "valgrind"):
        if shutil.which(tool) is None:
            raise CountError(f"{tool} is missing" + (": apt-get install valgrind" if tool == "valgrind" else ""))
    _run("cargo", "build", "--release", "--quiet", "--package", "viaduct-switch", "--example", "forward")
    instructions = {}
    for name, case in CASES.items():
        short, long = (_total(*case, frames) for frames in _FRAMES)
        instructions[name] = round((long - short) / (_FRAMES[1] - _FRAMES[0]), 1)
    return Counts(_run("rustc", "--version").strip(), instructions)


def _kept() -> Counts | None:
    return msgspec.json.decode(_STORE.read_bytes(), type=Counts) if _STORE.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="keep the new figures for later comparisons")
    update = parser.parse_args().update
    try:
        now = count()
    except CountError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    before = _kept()
    grown = False
    for name, value in now.instructions.items():
        old = before.instructions.get(name) if before else None
        change = (value - old) / old if old else 0.0
        grown |= change > GROWTH_ALLOWED
        kept = f", kept {old:.1f} ({change:+.1%})" if old else ""
        print(f"{name:28} {value:7.1f} instructions a frame{kept}")
    if update:
        _STORE.write_bytes(msgspec.json.format(msgspec.json.encode(now)) + b"\n")
        return 0
    if grown:
        compiler = f" (kept with {before.compiler}, now {now.compiler})" if before else ""
        print(
            f"bench: more than {GROWTH_ALLOWED:.0%} more instructions than kept{compiler}; "
            "if that is the price of something, keep them: python -m bench.instructions --update",
            file=sys.stderr,
        )
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
