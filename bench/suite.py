"""What is measured: the cells of the full and the quick suite, and the order in which they are run."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench import footprint, hugepages, report, viaduct
from bench.backend import BackEnd
from bench.generator import MEMORY_MB, PORTS_MAX, RING_MODES, Generator, Load
from bench.interleave import Contender, compare
from bench.ovs import Ovs
from bench.placement import PlacementProbe
from bench.process import ProgramError
from bench.report import Cell, Report
from bench.testpmd import Testpmd
from bench.viaduct import AdaptiveViaduct, CrowdedViaduct, OtherViaduct, Viaduct

BACK_ENDS: dict[str, type[BackEnd]] = {
    kind.name: kind for kind in (Testpmd, Ovs, Viaduct, AdaptiveViaduct, OtherViaduct)
}
DEFAULT_BACK_ENDS = ("testpmd", "ovs", "viaduct")

VARIANTS: dict[str, tuple[type[BackEnd], ...]] = {
    "adaptive": (Viaduct, AdaptiveViaduct),
    "ports": (AdaptiveViaduct, CrowdedViaduct),
}
"""Parts in which our switch is compared with itself."""

# So many learned addresses fit OVS's table; its default of 8192 would be too few for the largest run.
_OPTIONS = {"ovs": ("other-config:mac-table-size=65536",)}


class Plan(msgspec.Struct, frozen=True):
    """One suite. `slot` in seconds; `starts` is how often the time to the first packet is taken."""

    name: str
    cells: tuple[tuple[str, str, Load], ...]
    rounds: int
    slot: float
    starts: int
    idle_seconds: float


def _latency(rate: float) -> Load:
    return Load(rate=rate, stamp=8, check=1)


FULL = Plan(
    name="full",
    cells=(
        *(
            ("modes", mode, Load(size=size, both=both))
            for mode in RING_MODES
            for size in (64, 512, 1500)
            for both in (False, True)
        ),
        *(("stations", "split", Load(sources=count)) for count in (1, 1000, 4000, 20_000)),
        *(("latency", "split", _latency(rate)) for rate in (1e5, 1e6, 3e6)),
        *(("adaptive", mode, Load(both=both)) for mode in ("split", "packed") for both in (False, True)),
        ("ports", "split", Load(both=True)),
    ),
    rounds=10,
    slot=0.3,
    starts=5,
    idle_seconds=4,
)

QUICK = Plan(
    name="quick",
    cells=(
        ("modes", "split", Load()),
        ("modes", "split", Load(both=True)),
        ("modes", "split", Load(size=1500)),
        ("modes", "packed", Load()),
        ("modes", "packed", Load(both=True)),
        ("modes", "packed", Load(size=1500)),
    ),
    rounds=5,
    slot=0.25,
    starts=1,
    idle_seconds=1.5,
)


def cpus() -> tuple[int, int]:
    """The two CPUs in use: the first for back-ends, the second for generators. Raises ProgramError."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise ProgramError("two CPUs are needed, one for the switch and one for the generator")
    return available[0], available[1]


def _start(kinds: Sequence[type[BackEnd]], mode: str, pair: tuple[int, int], stack: ExitStack) -> list[Contender]:
    """All back-ends with their generators, connected and paused."""
    contenders = []
    for kind in kinds:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="viaduct-bench-"))
        backend = stack.enter_context(kind(Path(directory), pair[0]))
        backend.start(_OPTIONS.get(kind.name, ()))
        backend.settle()
        generator = stack.enter_context(Generator(backend.sockets[:PORTS_MAX], RING_MODES[mode], pair[1]))
        generator.ready()
        for first in range(PORTS_MAX, kind.ports, PORTS_MAX):  # connected and silent
            more = backend.sockets[first : first + PORTS_MAX]
            stack.enter_context(Generator(more, RING_MODES[mode], pair[1])).ready()
        generator.wait_for_traffic()
        backend.pause()
        contenders.append(Contender(backend, generator))
    return contenders


def _run_cells(plan: Plan, kinds: Sequence[type[BackEnd]], results: Report, say: Callable[[str], None]) -> None:
    pair = cpus()
    with ExitStack() as whole:
        probe = PlacementProbe(pair)
        whole.callback(probe.stop)
        stack = whole.enter_context(ExitStack())
        running: tuple[str, Sequence[type[BackEnd]]] | None = None
        contenders: list[Contender] = []
        for part, mode, load in plan.cells:
            wanted = (mode, VARIANTS.get(part, kinds))
            if part in VARIANTS and Viaduct not in kinds:
                continue
            say(f"{part}: {RING_MODES[mode].title}, {load.words()}")
            try:
                if running != wanted:
                    stack.close()
                    running = None
                    contenders = _start(wanted[1], mode, pair, stack)
                    running = wanted
                rounds = compare(contenders, load, probe, rounds=plan.rounds, seconds=plan.slot, progress=say)
                results.cells.append(Cell(part, mode, load, rounds))
            except ProgramError as error:
                results.failures.append(f"{part}, {mode}, {load.words()}: {error}")
                say(f"failed: {error}")
                stack.close()
                running = None


def run(plan: Plan, names: Sequence[str], say: Callable[[str], None]) -> Report:
    """Measure everything in a plan. Failures of single cells are noted in the report and the rest goes on."""
    kinds = [BACK_ENDS[name] for name in names]
    begin = time.time()
    results = Report(
        suite=plan.name,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(begin)),
        seconds=0,
        machine=report.machine(viaduct.command()),
        titles={kind.name: kind.title for kind in kinds},
    )
    largest: list[type[BackEnd]] = [*kinds, CrowdedViaduct]
    needed = sum(kind.hugepages_mb + MEMORY_MB * -(-kind.ports // PORTS_MAX) for kind in largest)
    with hugepages.reserved(needed):
        _run_cells(plan, kinds, results, say)
        for kind in kinds:
            # What a user runs: the switch with its own choice of polling.
            chosen = AdaptiveViaduct if kind is Viaduct else kind
            say(f"footprint: {chosen.title}")
            try:
                measured = footprint.measure(chosen, cpus(), starts=plan.starts, seconds=plan.idle_seconds)
                results.footprints[kind.name] = measured
            except ProgramError as error:
                results.failures.append(f"footprint of {kind.name}: {error}")
                say(f"failed: {error}")
    results.seconds = round(time.time() - begin, 1)
    return results
