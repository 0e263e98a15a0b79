"""What is measured: the cells of the full and the quick suite, and the order in which they are run."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench import footprint, hugepages, pollers, report, streams, summary, viaduct
from bench.backend import BackEnd
from bench.generator import MEMORY_MB, PORTS_MAX, RING_MODES, Generator, Load
from bench.interleave import Contender, compare, near
from bench.ovs import Ovs
from bench.placement import PlacementProbe
from bench.process import ProgramError
from bench.programs import BuildError
from bench.report import Cell, Report
from bench.testpmd import Testpmd
from bench.viaduct import (
    AdaptiveViaduct,
    BusyCrowdedViaduct,
    BusyPopulousViaduct,
    CrowdedViaduct,
    OtherViaduct,
    PopulousViaduct,
    SmallPagesViaduct,
    Viaduct,
)

BACK_ENDS: dict[str, type[BackEnd]] = {
    kind.name: kind for kind in (Testpmd, Ovs, Viaduct, AdaptiveViaduct, OtherViaduct)
}
DEFAULT_BACK_ENDS = ("testpmd", "ovs", "viaduct")

VARIANTS: dict[str, tuple[type[BackEnd], ...]] = {
    "adaptive": (Viaduct, AdaptiveViaduct),
    "ports": (AdaptiveViaduct, PopulousViaduct, CrowdedViaduct),
    "ports, busy": (Viaduct, BusyPopulousViaduct, BusyCrowdedViaduct),
    "pages": (Viaduct, SmallPagesViaduct),
}
"""Parts in which our switch is compared with itself."""

# So many learned addresses fit OVS's table; its default of 8192 would be too few for the largest run.
_OPTIONS = {"ovs": ("other-config:mac-table-size=65536",)}


class Plan(msgspec.Struct, frozen=True):
    """One suite. `slot` in seconds; `starts` is how often the time to the first packet is taken. Cells that found the
    cores apart are tried again while less than `budget` seconds have passed. Each turn of a TCP stream takes twice
    `stream_seconds`."""

    name: str
    cells: tuple[tuple[str, str, Load], ...]
    rounds: int
    slot: float
    starts: int
    idle_seconds: float
    budget: float
    stream_rounds: int = 0
    stream_seconds: float = 1
    poller_rounds: int = 0


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
        *((part, "split", Load(both=True)) for part in ("ports", "ports, busy")),
        *(("pages", "split", Load(size=size)) for size in (64, 1500)),
    ),
    rounds=6,
    slot=0.3,
    starts=5,
    idle_seconds=3,
    budget=16 * 60,
    stream_rounds=5,
    poller_rounds=20,
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
    budget=100,
    poller_rounds=5,
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
        sockets, rings, huge = backend.sockets, RING_MODES[mode], kind.guest_hugepages
        generator = stack.enter_context(Generator(sockets[:PORTS_MAX], rings, pair[1], hugepages=huge))
        generator.ready()
        for first in range(PORTS_MAX, kind.ports, PORTS_MAX):  # connected and silent
            stack.enter_context(Generator(sockets[first : first + PORTS_MAX], rings, pair[1])).ready()
        generator.wait_for_traffic()
        backend.pause()
        contenders.append(Contender(backend, generator))
    return contenders


def _complete(cell: Cell) -> bool:
    return sum(map(near, cell.rounds)) >= summary.FEWEST


def _measure(
    plan: Plan, kinds: Sequence[type[BackEnd]], results: Report, say: Callable[[str], None], deadline: float
) -> None:
    """Every cell once, and again those that lack near rounds, as long as there is time."""
    with ExitStack() as stack:
        probe = PlacementProbe(cpus())
        stack.callback(probe.stop)
        planned = {(part, mode, load) for part, mode, load in plan.cells}
        waiting = [c for c in results.cells if (c.part, c.mode, c.load) in planned and not _complete(c)]
        first = True
        while waiting and (first or time.monotonic() < deadline):
            _one_pass(plan, kinds, waiting, probe, results, say, math.inf if first else deadline)
            waiting = [cell for cell in waiting if not _complete(cell)]
            first = False


def _one_pass(
    plan: Plan,
    kinds: Sequence[type[BackEnd]],
    cells: Sequence[Cell],
    probe: PlacementProbe,
    results: Report,
    say: Callable[[str], None],
    deadline: float,
) -> None:
    """Each cell once; back-ends stay alive from one cell to the next where they can."""
    with ExitStack() as stack:
        running: tuple[str, Sequence[type[BackEnd]]] | None = None
        contenders: list[Contender] = []
        for cell in cells:
            if time.monotonic() > deadline:
                return
            wanted = (cell.mode, VARIANTS.get(cell.part, kinds))
            say(str(cell))
            try:
                if running != wanted:
                    stack.close()
                    running = None
                    contenders = _start(wanted[1], cell.mode, cpus(), stack)
                    running = wanted
                rounds = compare(contenders, cell.load, probe, rounds=plan.rounds, seconds=plan.slot, progress=say)
                cell.rounds.extend(rounds)
                results.save()
            except ProgramError as error:
                results.failures.append(f"{cell}: {error}")
                say(f"failed: {error}")
                stack.close()
                running = None


def _hugepages(kinds: Sequence[type[BackEnd]]) -> int:
    """Megabytes that the peers and the generators need at the same time."""

    def together(kinds: Sequence[type[BackEnd]]) -> int:
        return sum(kind.hugepages_mb + MEMORY_MB * -(-kind.ports // PORTS_MAX) for kind in kinds)

    return max(together(kinds), *map(together, VARIANTS.values()))


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
        cells=[Cell(*cell) for cell in plan.cells if cell[0] not in VARIANTS or Viaduct in kinds],
    )
    deadline = time.monotonic() + plan.budget
    with hugepages.reserved(_hugepages(kinds)):
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
        if Viaduct in kinds and plan.poller_rounds:
            _measure_ours(plan, results, say)
        _measure(plan, kinds, results, say, deadline)
    results.seconds = round(time.time() - begin, 1)
    return results


def _measure_ours(plan: Plan, results: Report, say: Callable[[str], None]) -> None:
    """What is asked of our switch beside packet rates; streams bring peers of their own."""
    say("many ports, two pollers")
    try:
        results.crowded_memory[CrowdedViaduct.name] = footprint.crowded_memory(CrowdedViaduct, cpus())
        results.pollers = pollers.measure(cpus(), plan.poller_rounds)
    except (ProgramError, BuildError) as error:
        results.failures.append(f"many ports, two pollers: {error}")
        say(f"failed: {error}")
    if plan.stream_rounds:
        with hugepages.reserved(streams.HUGEPAGES_MB):
            for part in streams.PARTS:
                measured = streams.measure(
                    part,
                    cpus(),
                    rounds=plan.stream_rounds,
                    seconds=plan.stream_seconds,
                    say=say,
                    failures=results.failures,
                )
                results.streams.append(measured)
                results.save()


def resume(plan: Plan, results: Report, say: Callable[[str], None]) -> Report:
    """Go on with a run that ended before all its cells had near rounds."""
    begin = time.time()
    kinds = [BACK_ENDS[name] for name in results.titles]
    done = {(cell.part, cell.mode, cell.load) for cell in results.cells}
    results.cells += [Cell(*cell) for cell in plan.cells if cell not in done]
    with hugepages.reserved(_hugepages(kinds)):
        _measure(plan, kinds, results, say, time.monotonic() + plan.budget)
    results.seconds = round(results.seconds + time.time() - begin, 1)
    return results
