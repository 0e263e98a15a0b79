"""TCP streams over roads of different makes, interleaved as the packet rates are (interleave.py).

Each turn of a road has two halves. In the first the guests run where the scheduler puts them, as they would for a user:
its bytes per second are the stream rate. In the second they are confined to the second CPU and leave the first to the
switch, so that its own count of busy cycles has no other program's time in it: cycles per byte come from there. Guests
are emulated here, which bounds the rate of every road; the cycles per byte say what the switch itself could carry.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench import roads, summary
from bench.ovs import Ovs
from bench.placement import PlacementProbe
from bench.process import ProgramError
from bench.roads import OvsSegments, Road
from bench.testpmd import Testpmd

PARTS: dict[str, tuple[Callable[[Path, int, str], Road], tuple[str, ...]]] = {
    "guests": (roads.between_guests, tuple(roads.GUEST_ROADS)),
    "tap": (roads.from_host, roads.TAP_ROADS),
}


HUGEPAGES_MB = sum(kind.hugepages_mb for kind in (Testpmd, Ovs, OvsSegments))
"""What the peers of one part need at the same time."""


class Turn(msgspec.Struct, frozen=True):
    """Bytes a second, and the switch's busy cycles for each byte; None where the switch is the kernel."""

    rate: float
    cycles: float | None
    compared: int
    damaged: int


class Streams(msgspec.Struct):
    """One part: what each road is called, and the rounds, each with one turn of every road."""

    part: str
    titles: dict[str, str]
    rounds: list[dict[str, Turn]] = []

    def figures(self, name: str, value: Callable[[Turn], float | None]) -> summary.Spread | None:
        """Median and spread of one road's value."""
        turns = (turns[name] for turns in self.rounds if name in turns)
        return summary.spread(found for turn in turns if (found := value(turn)) is not None)

    def ratio(self, name: str, peer: str, value: Callable[[Turn], float | None]) -> summary.Spread | None:
        """Median and spread of the ratio between two roads in the same round."""
        pairs = [(value(turns[name]), value(turns[peer])) for turns in self.rounds if name in turns and peer in turns]
        return summary.spread(one / other for one, other in pairs if one is not None and other)


def _turn(road: Road, seconds: float, cpus: tuple[int, int], tsc_hz: int) -> Turn:
    road.resume()
    free = road.send(seconds, set(cpus))
    if road.backend is None:
        road.pause()
        return Turn(round(free.received / free.seconds), None, free.compared, free.damaged)
    road.backend.tsc_hz = tsc_hz
    before = road.backend.work().cycles
    apart = road.send(seconds, {cpus[1]})
    cycles = road.backend.work().cycles - before
    road.pause()
    return Turn(
        rate=round(free.received / free.seconds),
        cycles=round(cycles / max(apart.received, 1), 4),
        compared=free.compared + apart.compared,
        damaged=free.damaged + apart.damaged,
    )


def measure(
    part: str,
    cpus: tuple[int, int],
    *,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    failures: list[str],
    only: Sequence[str] = (),
) -> Streams:
    """All roads of a part. What does not start is named in `failures`, and the others go on."""
    make, names = PARTS[part]
    found = Streams(part, {})
    with ExitStack() as stack:
        probe = PlacementProbe(cpus)
        stack.callback(probe.stop)
        ready: list[Road] = []
        for name in only or names:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="viaduct-bench-")))
            road = stack.enter_context(make(directory, cpus[0], name))
            say(f"{part}: {road.title}")
            try:
                road.start()
                road.open()
            except ProgramError as error:
                failures.append(f"{part}, {road.title}: {error}")
                say(f"failed: {error}")
                continue
            road.pause()
            ready.append(road)
            found.titles[name] = road.title
        for _ in range(rounds):
            turns = {}
            for road in list(ready):
                try:
                    turns[road.name] = _turn(road, seconds, cpus, probe.tsc_hz())
                except ProgramError as error:
                    failures.append(f"{part}, {road.title}: {error}")
                    ready.remove(road)
            found.rounds.append(turns)
            say("  ".join(f"{name} {t.rate / 1e6:.0f} MB/s {t.cycles or 0:.2f} cycles/B" for name, t in turns.items()))
    return found
