"""Interleaved comparison: all back-ends alive at once on the same two CPUs, one at a time running.

Theory of operation. The virtual CPUs of a cloud machine move between the host's cores, and other guests come and go:
two runs of one program, minutes apart, differ by a factor of two. What can be compared is what happens within the same
second. So each back-end is started with a generator of its own, connected, and stopped with SIGSTOP. Then come
*rounds*: in each, every back-end in turn gets a *slot* of a few tenths of a second in which it and its generator run.
The generator stops sending and lets the rings drain at the end of its slot, so that a back-end is stopped while idle,
and its own count of busy cycles is not disturbed by the time it stood still.

A slot is kept with what was seen during it: the round trip of a cache line between the two CPUs (placement.py), and
how long the forwarding thread and the generator were kept waiting for their CPUs by others. The ratio of two back-ends
is taken within a round, between slots of the same placement, and only the median of many rounds is reported, with its
spread.
"""

import statistics
from collections.abc import Callable, Sequence

import msgspec

from bench.backend import BackEnd
from bench.generator import Generator, Latency, Load, Result
from bench.placement import Placement, PlacementProbe, classify
from bench.process import CpuTime, Program, ProgramError

DISTURBED_SHARE = 0.03
"""A slot is called disturbed when forwarding thread or generator waited for a CPU for more than this share of it."""

_SETTLE_S = 0.02


class Slot(msgspec.Struct, frozen=True, omit_defaults=True):
    """One back-end's turn in one round. Rates in packets a second, cycles of the time-stamp counter."""

    rate: float
    cycles: float
    """Busy cycles for each packet the back-end took."""
    busy: float
    """The share of the slot that those cycles fill."""
    round_trip_ns: float
    placement: Placement
    waited: float
    sent: int
    lost: int
    checked: int
    corrupt: int
    disordered: int
    latency_us: dict[str, float] | None = None
    """Percentiles by name, `p50` for one; only where a load is rate-limited."""

    @property
    def disturbed(self) -> bool:
        return self.waited > DISTURBED_SHARE


class Contender:
    """A back-end and its generator, stopped unless it is their turn."""

    def __init__(self, backend: BackEnd, generator: Generator) -> None:
        self.backend = backend
        self.generator = generator
        backend.tsc_hz = generator.tsc_hz

    @property
    def name(self) -> str:
        return self.backend.name


def _waited(program: Program, before: dict[int, CpuTime]) -> float:
    """Seconds that the busiest thread was kept from its CPU since `before`."""
    deltas = [
        CpuTime(now.running - then.running, now.waiting - then.waiting)
        for thread, now in program.threads().items()
        if (then := before.get(thread)) is not None
    ]
    return max(deltas, default=CpuTime(0, 0)).waiting


def _rate(result: Result) -> float:
    """The median of a run's intervals, without those at its start."""
    settled = [
        rate
        for sample, rate in zip(result.samples, result.rates(), strict=True)
        if sample.time - result.start > _SETTLE_S * 2
    ]
    return statistics.median(settled or result.rates())


_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


def _percentiles(latency: Latency) -> dict[str, float]:
    """The distribution as a few percentiles: a slot's whole histogram is too much to keep."""
    found: dict[str, float] = {}
    passed = 0
    for microseconds, count in latency.histogram:
        passed += count
        for percent in _PERCENTILES:
            if passed >= latency.count * percent / 100:
                found.setdefault(f"p{percent:g}", microseconds)
    return found


def take_slot(contender: Contender, load: Load, seconds: float, probe: PlacementProbe) -> Slot:
    """Let one contender run, and weigh what it did."""
    backend, generator = contender.backend, contender.generator
    backend.resume()
    generator.announce(load)
    threads, generator_threads = backend.program().threads(), generator.program.threads()
    before = backend.work()
    result = generator.run(load, seconds, interval=0.025)
    waited = max(_waited(backend.program(), threads), _waited(generator.program, generator_threads))
    after = backend.work()
    backend.pause()
    cycles, packets = after.cycles - before.cycles, after.packets - before.packets
    round_trips = probe.during(result.start, result.end)
    return Slot(
        rate=round(_rate(result)),
        cycles=round(cycles / max(packets, 1), 2),
        busy=round(cycles / generator.tsc_hz / (result.end - result.start), 3),
        round_trip_ns=round(statistics.median(round_trips), 1) if round_trips else 0,
        placement=classify(round_trips),
        waited=round(waited / (result.end - result.start), 4),
        sent=result.sent,
        lost=result.lost,
        checked=result.checked,
        corrupt=result.corrupt,
        disordered=result.disordered,
        latency_us=_percentiles(result.latency_us) if load.rate and result.latency_us else None,
    )


Round = dict[str, Slot]


def near(slots: Round) -> bool:
    """Whether the cores shared a cache throughout a round."""
    return all(slot.placement == "near" for slot in slots.values())


def good(slots: Round) -> bool:
    """Whether a round was near and undisturbed throughout: what the headline figures are made of."""
    return near(slots) and not any(slot.disturbed for slot in slots.values())


def compare(
    contenders: Sequence[Contender],
    load: Load,
    probe: PlacementProbe,
    *,
    rounds: int,
    seconds: float,
    patience: int = 2,
    streak: int = 4,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Round]:
    """Rounds of all contenders under one load: until `rounds` of them are good, at most `patience` times as many.

    Gives up when none of the last `streak` rounds was near: the cores have been moved apart, try another time.
    """
    for contender in contenders:  # a first slot for caches, tables and branch predictors; it does not count
        slot = take_slot(contender, load, seconds / 2, probe)
        if slot.lost >= slot.sent:
            raise ProgramError(f"{contender.name} delivers nothing of {slot.sent} frames sent")
    done: list[Round] = []
    while sum(map(good, done)) < rounds and len(done) < rounds * patience:
        if len(done) >= streak and not any(map(near, done[-streak:])):
            break
        done.append({contender.name: take_slot(contender, load, seconds, probe) for contender in contenders})
        latest = done[-1]
        progress("  ".join(f"{name} {s.cycles:.0f} cycles {s.rate / 1e6:.2f} Mpps" for name, s in latest.items()))
    return done
