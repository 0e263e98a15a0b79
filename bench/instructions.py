"""Instructions per packet: a guard against slow growth that does not wander with the machine.

`python -m bench.instructions` forwards frames in a program of its own (crates/switch/examples/forward.rs) under
Valgrind, which counts the instructions of the forwarding function and all it calls, and compares with the figures kept
in bench/results/instructions.json: it fails where one has grown by more than 5 %. `--update` keeps the new figures.

Each figure is the difference between a long and a short run divided by the difference in frames, so that starting up
does not count. Compilers differ, so figures are kept for each release of rustc; `make` runs this with the one that also
lints. Cycles are another matter (most of a packet's time goes into cache lines that the other core has just written),
but what is not executed cannot become slow.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from bench import programs
from bench.programs import BuildError
from bench.report import RESULTS

GROWTH_ALLOWED = 0.05
OTHER_COMPILER_ALLOWED = 0.15
"""Where no figures are kept for this compiler, those of the last one that has some are the measure."""
_STORE = RESULTS / "instructions.json"
_ROOT = Path(__file__).parent.parent
_COUNTED = "*Forwarder::forward*"
_STATIONS = 20_000
_FRAMES = (6_400, 19_200)
_FRAMES_OF_STATIONS = (_STATIONS, 2 * _STATIONS)
"""The short run makes all addresses known, the long one sees each a second time."""
_PATIENCE_S = 240

Case = tuple[str, ...]
CASES: dict[str, Case] = {
    f"{layout}, {size} B{''.join(', ' + word for word in extra)}": (layout, str(size), *extra)
    for layout in ("split", "packed")
    for size, extra in (
        (64, ()),
        (1500, ()),
        (64, ("unmergeable",)),
        (1500, ("unmergeable",)),
        (64, ("scattered",)),
        (64, (f"macs={_STATIONS}",)),
    )
}
"""The program's arguments by what they mean: ring layout, frame size, and receive buffers that take one frame each,
header and frame in buffers of their own, or that many source addresses."""

Figures = dict[str, float]
"""Instructions for each frame, by case."""


class CountError(RuntimeError):
    """A tool is missing, or the counted program failed."""


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise CountError(f"{' '.join(command)} has not ended within {_PATIENCE_S} s") from None
    if result.returncode:
        raise CountError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def _total(program: str, case: Case, frames: int) -> int:
    """Instructions of the forwarding function in one run."""
    layout, size, *extra = case
    with tempfile.TemporaryDirectory(prefix="viaduct-bench-") as directory:
        output = Path(directory) / "count"
        options = ["--tool=callgrind", f"--toggle-collect={_COUNTED}", f"--callgrind-out-file={output}"]
        _run("valgrind", "-q", *options, program, layout, size, str(frames), *extra)
        counted = output.read_text()
    found = re.search(r"^totals: (\d+)", counted, re.MULTILINE)
    if not found or int(found[1]) == 0:
        raise CountError(f"callgrind has not seen the function {_COUNTED}")
    return int(found[1])


def count() -> tuple[str, Figures]:
    """Build the program and count every case. Returns the compiler as well. Raises CountError."""
    for tool in ("cargo", "valgrind"):
        if shutil.which(tool) is None:
            raise CountError(f"{tool} is missing" + (": apt-get install valgrind" if tool == "valgrind" else ""))
    program = str(programs.example("forward"))

    def instructions(case: Case) -> float:
        frames = _FRAMES_OF_STATIONS if case[-1].startswith("macs=") else _FRAMES
        short, long = (_total(program, case, number) for number in frames)
        return round((long - short) / (frames[1] - frames[0]), 1)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        figures = dict(zip(CASES, pool.map(instructions, CASES.values()), strict=True))
    return _run("rustc", "--version").strip(), figures


def judge(figures: Figures, kept: dict[str, Figures], compiler: str) -> tuple[list[str], list[str]]:
    """What to print about each case, and what is wrong. `kept`: earlier figures by compiler."""
    basis = compiler if compiler in kept else next(reversed(kept), "")
    allowed = GROWTH_ALLOWED if basis == compiler else OTHER_COMPILER_ALLOWED
    lines, faults = [], []
    for name, value in figures.items():
        line = f"{name:28} {value:7.1f} instructions a frame"
        if (old := kept.get(basis, {}).get(name)) is None:
            faults.append(f"{name}: no figure is kept")
        else:
            change = (value - old) / old
            line += f", kept {old:.1f} ({change:+.1%})"
            if change > allowed:
                faults.append(f"{name}: {value:.1f} instead of {old:.1f} instructions, {change:+.1%}")
        lines.append(line)
    if faults:
        faults.append(f"kept with {basis or 'no compiler'}, counted with {compiler}, {allowed:.0%} more allowed")
    return lines, faults


def _kept() -> dict[str, Figures]:
    return msgspec.json.decode(_STORE.read_bytes(), type=dict[str, Figures]) if _STORE.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="keep the new figures for later comparisons")
    update = parser.parse_args().update
    try:
        compiler, figures = count()
    except (CountError, BuildError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    kept = _kept()
    lines, faults = judge(figures, kept, compiler)
    print("\n".join(lines))
    if update:
        kept.pop(compiler, None)  # the latest comes last
        _STORE.write_bytes(msgspec.json.format(msgspec.json.encode(kept | {compiler: figures})) + b"\n")
        print(f"kept in {_STORE.relative_to(_ROOT)} for {compiler}")
        return 0
    if faults:
        print("bench: too many more instructions for each frame than kept:", file=sys.stderr)
        print("\n".join(f"  {fault}" for fault in faults), file=sys.stderr)
        print(
            "If that is the price of something wanted, keep the new figures and say so in the commit:\n"
            "  make bench-instructions UPDATE=1",
            file=sys.stderr,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
