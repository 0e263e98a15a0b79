"""What is measured: the cells of the full and the quick suite, and the order in which they are run."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench import footprint, hugepages, report, summary, viaduct
from bench.backend import BackEnd
from bench.generator import MEMORY_MB, PORTS_MAX, RING_MODES, Generator, Load
from bench.interleave import Contender, compare, near
from bench.ovs import Ovs
from bench.placement import PlacementProbe
from bench.process import ProgramError
from bench.report import Cell, Report
from bench.testpmd import Testpmd
from bench.viaduct import AdaptiveViaduct, CrowdedViaduct, OtherViaduct, SmallPagesViaduct, Viaduct

BACK_ENDS: dict[str, type[BackEnd]] = {
    kind.name: kind for kind in (Testpmd, Ovs, Viaduct, AdaptiveViaduct, OtherViaduct)
}
DEFAULT_BACK_ENDS = ("testpmd", "ovs", "viaduct")

VARIANTS: dict[str, tuple[type[BackEnd], ...]] = {
    "adaptive": (Viaduct, AdaptiveViaduct),
    "ports": (AdaptiveViaduct, CrowdedViaduct),
    "pages": (Viaduct, SmallPagesViaduct),
}
"""Parts in which our switch is compared with itself."""

# So many learned addresses fit OVS's table; its default of 8192 would be too few for the largest run.
_OPTIONS = {"ovs": ("other-config:mac-table-size=65536",)}


class Plan(msgspec.Struct, frozen=True):
    """One suite. `slot` in seconds; `starts` is how often the time to the first packet is taken. Cells that found the
    cores apart are tried again while less than `budget` seconds have passed."""

    name: str
    cells: tuple[tuple[str, str, Load], ...]
    rounds: int
    slot: float
    starts: int
    idle_seconds: float
    budget: float


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
        *(("pages", "split", Load(size=size)) for size in (64, 1500)),
    ),
    rounds=8,
    slot=0.3,
    starts=5,
    idle_seconds=4,
    budget=15 * 60,
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


def _measure(plan: Plan, kinds: Sequence[type[BackEnd]], results: Report, say: Callable[[str], None]) -> None:
    """Every cell once, and again those that lack near rounds, as long as there is time."""
    deadline = time.monotonic() + plan.budget
    with ExitStack() as stack:
        probe = PlacementProbe(cpus())
        stack.callback(probe.stop)
        planned = {(part, mode, load) for part, mode, load in plan.cells}
        waiting = [c for c in results.cells if (c.part, c.mode, c.load) in planned and not _complete(c)]
        while waiting:
            _one_pass(plan, kinds, waiting, probe, results, say)
            waiting = [cell for cell in waiting if not _complete(cell)]
            if time.monotonic() > deadline:
                break


def _one_pass(
    plan: Plan,
    kinds: Sequence[type[BackEnd]],
    cells: Sequence[Cell],
    probe: PlacementProbe,
    results: Report,
    say: Callable[[str], None],
) -> None:
    """Each cell once; back-ends stay alive from one cell to the next where they can."""
    with ExitStack() as stack:
        running: tuple[str, Sequence[type[BackEnd]]] | None = None
        contenders: list[Contender] = []
        for cell in cells:
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
    largest: list[type[BackEnd]] = [*kinds, CrowdedViaduct]
    return sum(kind.hugepages_mb + MEMORY_MB * -(-kind.ports // PORTS_MAX) for kind in largest)


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
    with hugepages.reserved(_hugepages(kinds)):
        _measure(plan, kinds, results, say)
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


def resume(plan: Plan, results: Report, say: Callable[[str], None]) -> Report:
    """Go on with a run that ended before all its cells had near rounds."""
    begin = time.time()
    kinds = [BACK_ENDS[name] for name in results.titles]
    done = {(cell.part, cell.mode, cell.load) for cell in results.cells}
    results.cells += [Cell(*cell) for cell in plan.cells if cell not in done]
    with hugepages.reserved(_hugepages(kinds)):
        _measure(plan, kinds, results, say)
    results.seconds = round(results.seconds + time.time() - begin, 1)
    return results
