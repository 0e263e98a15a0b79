"""The targets, and how the last results stand to them: made from a report, nothing is typed in.

A target has one figure for each ring mode, size or peer; it is met when all of them are. Of those that are not met, the
worst is named, with what bounds it.
"""

from collections.abc import Callable, Iterator, Sequence

import msgspec

from bench import pollers, summary
from bench.generator import RING_MODES
from bench.interleave import Slot
from bench.report import Cell, Report
from bench.suite import VARIANTS
from bench.viaduct import AdaptiveViaduct, CrowdedViaduct

OURS, OUR_STREAMS = "viaduct", AdaptiveViaduct.name

Figures = dict[str, float]
"""What was measured, by what distinguishes it from the others of the same target."""


class Target(msgspec.Struct, frozen=True):
    """`limit` is the most that is allowed, or the least where `at_least`. `shown` formats figures and limit."""

    what: str
    limit: float
    figures: Callable[[Report], Figures]
    at_least: bool = False
    shown: str = "{:.2f}"
    bound: str = ""
    """What stands in the way where it is missed."""

    def excess(self, value: float) -> float:
        """How far a value is beyond the limit, as a share of it; negative on the right side."""
        return self.limit / value - 1 if self.at_least and value else value / self.limit - 1


def _cycles(slot: Slot) -> float:
    return slot.cycles


def _rate(slot: Slot) -> float:
    return slot.rate


def _name(cell: Cell) -> str:
    load = cell.load
    return f"{RING_MODES[cell.mode].title}, {load.size} B, {'both directions' if load.both else 'one direction'}"


def _cells(report: Report, part: str, sizes: Sequence[int] = ()) -> Iterator[Cell]:
    return (c for c in report.cells if c.part == part and c.rounds and (not sizes or c.load.size in sizes))


def _against(peer: str, value: Callable[[Slot], float], sizes: Sequence[int] = ()) -> Callable[[Report], Figures]:
    """The ratio to a peer in each ring mode, of frames of these sizes."""

    def figures(report: Report) -> Figures:
        found = {}
        for cell in _cells(report, "modes", sizes):
            if ratio := summary.ratio(summary.choose(cell.rounds)[1], OURS, peer, value):
                found[_name(cell)] = ratio.median
        return found

    return figures


def _stations(report: Report) -> Figures:
    medians = {
        cell.load.sources: found.median
        for cell in _cells(report, "stations")
        if (found := summary.figures(summary.choose(cell.rounds)[1], OURS, _cycles))
    }
    return {"": medians[20_000] / medians[1]} if {1, 20_000} <= medians.keys() else {}


def _latency(report: Report) -> Figures:
    found = {}
    for cell in _cells(report, "latency"):
        rounds = summary.choose(cell.rounds)[1]
        for percentile in ("p50", "p99"):

            def value(slot: Slot, percentile: str = percentile) -> float:
                return (slot.latency_us or {}).get(percentile, 0)

            if ratio := summary.ratio(rounds, OURS, "testpmd", value):
                found[f"{cell.load.rate / 1e6:g} Mpps, {percentile}"] = ratio.median
    return found


def _variants(value: Callable[[Slot], float], *parts: str, last: bool = False) -> Callable[[Report], Figures]:
    """The ratio of our switch in another setting to the plain one; with `last` only the last setting counts."""

    def figures(report: Report) -> Figures:
        found = {}
        for part in parts:
            plain, *others = VARIANTS[part]
            for cell in _cells(report, part):
                for other in others[-1:] if last else others:
                    ratio = summary.ratio(summary.choose(cell.rounds)[1], other.name, plain.name, value)
                    if ratio:
                        found[f"{other.title}, {_name(cell)}"] = ratio.median
        return found

    return figures


def _footprint(field: str, scale: float = 1) -> Callable[[Report], Figures]:
    def figures(report: Report) -> Figures:
        mine = report.footprints.get(OURS)
        return {"": getattr(mine, field) / scale} if mine else {}

    return figures


def _crowded_memory(report: Report) -> Figures:
    size = report.crowded_memory.get(CrowdedViaduct.name)
    return {"": size / 1e6} if size else {}


def _pollers(report: Report) -> Figures:
    found = pollers.gain(report.pollers)
    return {"": found.median} if found else {}


def _streams(part: str, peers: Sequence[str] = (), *, cycles: bool = False) -> Callable[[Report], Figures]:
    """Our rate in terms of each peer's, or each peer's cycles for a byte in terms of ours."""

    def figures(report: Report) -> Figures:
        found = {}
        for streams in (s for s in report.streams if s.part == part):
            for name, title in streams.titles.items():
                if name == OUR_STREAMS or (peers and name not in peers):
                    continue
                if cycles:
                    ratio = streams.ratio(name, OUR_STREAMS, lambda turn: turn.cycles)
                else:
                    ratio = streams.ratio(OUR_STREAMS, name, lambda turn: turn.rate)
                if ratio:
                    found[title] = ratio.median
        return found

    return figures


_EMULATED = "the guests, whose processors are emulated: every switch waits for them; see its cycles per byte"
_INSTRUCTIONS = (
    "the instructions for checking, parsing and learning, of which testpmd does none; packed rings have fewer cache "
    "lines to wait for that would hide them"
)

TARGETS = (
    Target("cycles per packet against testpmd io, 64 B", 0.8, _against("testpmd", _cycles, (64,)), bound=_INSTRUCTIONS),
    Target(
        "the same, 512 and 1500 B",
        0.7,
        _against("testpmd", _cycles, (512, 1500)),
        bound="the frame's own cache lines, which have to cross between the cores for everybody",
    ),
    Target(
        "cycles per packet against OVS-DPDK NORMAL, every mode and size",
        0.5,
        _against("ovs", _cycles),
        bound="the frame's own cache lines at 1500 B; the descriptors' at 64 B on packed rings",
    ),
    Target(
        "20,000 source addresses against one, ours",
        1.25,
        _stations,
        bound="a look into the table for each frame instead of one for a run of them, and a line that it costs",
    ),
    Target(
        "packets per second against testpmd io, every mode and size",
        1.0,
        _against("testpmd", _rate),
        at_least=True,
        bound="the generator, which shares the rings' cache lines with the switch and is waited for by both",
    ),
    Target("latency against testpmd io, 0.1, 1 and 3 Mpps", 1.0, _latency, bound="the host's own interruptions"),
    Target(
        "64 ports against 2, traffic on two, adaptive and busy",
        1.1,
        _variants(_cycles, "ports", "ports, busy", last=True),
        bound="a busy poller looks at each ring in each round, one cache line for each",
    ),
    Target(
        "packets per second, adaptive against busy polling",
        0.97,
        _variants(_rate, "adaptive"),
        at_least=True,
        bound="wake-ups of a poller that found its rings empty for longer than it spins",
    ),
    Target("CPU with no traffic", 0.005, _footprint("cpu_idle"), shown="{:.2%}"),
    Target(
        "CPU at 10,000 packets a second",
        0.10,
        _footprint("cpu_10k"),
        shown="{:.1%}",
        bound="a wake-up for each packet: about 10 us of the kernel's time each on this machine",
    ),
    Target("memory with two ports, no hugepages, MB", 60, _footprint("own_small", 1e6), shown="{:.0f}"),
    Target("memory with 64 ports, MB", 100, _crowded_memory, shown="{:.0f}"),
    Target("process start to first forwarded packet, s", 0.4, _footprint("first_packet_median")),
    Target(
        "TCP between Linux guests, rate against OVS-DPDK without TSO",
        2.0,
        _streams("guests", ("ovs",)),
        at_least=True,
        bound=_EMULATED,
    ),
    Target(
        "TCP between Linux guests, rate against OVS-DPDK with userspace TSO",
        1.2,
        _streams("guests", ("ovs-tso",)),
        at_least=True,
        bound=_EMULATED,
    ),
    Target(
        "TCP between Linux guests, their cycles per byte against ours",
        1.2,
        _streams("guests", cycles=True),
        at_least=True,
        bound="the copy of each byte, of which both need one",
    ),
    Target(
        "TCP from a tap to a guest, rate against each",
        1.0,
        _streams("tap"),
        at_least=True,
        bound="the guest, whose processor is emulated, and the kernel's own cost of a tap, which is the same for all",
    ),
    Target(
        "TCP from a tap to a guest, their cycles per byte against ours",
        1.0,
        _streams("tap", cycles=True),
        at_least=True,
        bound="system calls, one for each frame read or written",
    ),
    Target(
        "a second poller on port pairs of its own",
        1.8,
        _pollers,
        at_least=True,
        bound="cache lines that both pollers write",
    ),
)


def verdict(target: Target, figures: Figures) -> tuple[str, str]:
    """What was measured and how it stands to the target, for the last two columns of the table."""
    ordered = sorted(figures.values())
    low, high = target.shown.format(ordered[0]), target.shown.format(ordered[-1])
    measured = low if low == high else f"{low} to {high}"
    missed = {name: value for name, value in figures.items() if target.excess(value) > 0}
    if not missed:
        return measured, "met"
    name, value = max(missed.items(), key=lambda item: target.excess(item[1]))
    share = f" in {len(missed)} of {len(figures)}" if len(figures) > 1 else ""
    where = f", most by {name}" if name else ""
    because = f"; bounded by {target.bound}" if target.bound else ""
    return (
        measured,
        f"**missed{share} by {abs(value / target.limit - 1):.0%}**{where} ({target.shown.format(value)}){because}",
    )


def rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Target, limit, ours, verdict: of all targets for which there are figures."""
    found = []
    for target in TARGETS:
        if figures := target.figures(report):
            limit = ("at least " if target.at_least else "at most ") + target.shown.format(target.limit)
            found.append((target.what, limit, *verdict(target, figures)))
    return found
