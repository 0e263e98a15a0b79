"""Markdown tables from a report, and their place in the README: between `<!-- bench -->` and `<!-- /bench -->`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import pollers, summary, targets
from bench.generator import RING_MODES
from bench.interleave import Round, Slot
from bench.report import Cell, Report
from bench.suite import VARIANTS
from bench.summary import Spread
from bench.viaduct import AdaptiveViaduct, CrowdedViaduct

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
OURS = "viaduct"
OUR_STREAMS = AdaptiveViaduct.name
STREAM_TITLES = {
    "guests": "TCP stream from Linux guest to Linux guest, with offloads",
    "tap": "TCP stream from the host's kernel to a Linux guest, with offloads",
}


def _cycles(slot: Slot) -> float:
    return slot.cycles


def _rate(slot: Slot) -> float:
    return slot.rate


def _measured(rounds: Sequence[Round], name: str) -> str:
    cycles, rate = summary.figures(rounds, name, _cycles), summary.figures(rounds, name, _rate)
    if cycles is None or rate is None:
        return "-"
    return f"{cycles.median:.0f} ({rate.median / 1e6:.1f})"


def _spread(value: Spread | None) -> str:
    return "-" if value is None else f"{value.median:.2f} [{value.low:.2f}-{value.high:.2f}]"


def row(cells: Sequence[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def head(cells: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [row(cells), row(["---"] * len(cells))]


def _subject(cell: Cell) -> str:
    load = cell.load
    words = [RING_MODES[cell.mode].title, f"{load.size} B", "both directions" if load.both else "one direction"]
    if cell.part == "stations":
        words.append(f"{load.sources} source address{'es' if load.sources > 1 else ''}")
    return ", ".join(words)


def _peers(report: Report) -> list[str]:
    return [name for name in report.titles if name != OURS]


def throughput(report: Report, part: str, size: int | None = None) -> list[str]:
    """Cycles per packet and rates by back-end, and the ratio of cycles to each peer's within a round."""
    names = list(report.titles)
    ours = OURS in names
    peers = _peers(report) if ours else []
    lines = head(
        [
            "cycles per packet (Mpps)",
            *(report.titles[name] for name in names),
            *(f"{report.titles[OURS]} / {report.titles[peer]}, cycles" for peer in peers),
            "rounds",
        ]
    )
    for cell in report.cells:
        if not cell.rounds or cell.part != part or (size is not None and cell.load.size != size):
            continue
        basis, rounds = summary.choose(cell.rounds)
        mark = {"near, undisturbed": "", "near": "*", "far": "**", "all": "***"}[basis]
        lines.append(
            row(
                [
                    _subject(cell),
                    *(_measured(rounds, name) for name in names),
                    *(_spread(summary.ratio(rounds, OURS, peer, _cycles)) for peer in peers),
                    f"{len(rounds)}{mark}",
                ]
            )
        )
    return lines if len(lines) > 2 else []


def variants(report: Report, part: str) -> list[str]:
    """Our switch against itself in other settings: cycles per packet, rates, and their ratios within a round."""
    plain, *others = VARIANTS[part]
    lines: list[str] = []
    for other in others:
        rows = [
            row(
                [
                    _subject(cell),
                    _measured(rounds, plain.name),
                    _measured(rounds, other.name),
                    _spread(summary.ratio(rounds, other.name, plain.name, _cycles)),
                    _spread(summary.ratio(rounds, other.name, plain.name, _rate)),
                    str(len(rounds)),
                ]
            )
            for cell in report.cells
            if cell.part == part and cell.rounds
            for rounds in (summary.choose(cell.rounds)[1],)
            if any(other.name in slots for slots in rounds)
        ]
        titles = [kind.title for kind in (plain, other)]
        if rows:
            lines += [
                "",
                *head(["cycles per packet (Mpps)", *titles, "cycles, ratio", "rate, ratio", "rounds"]),
                *rows,
            ]
    return lines[1:]


def streams(report: Report) -> list[str]:
    """TCP streams: rates, the switch's own cycles, and the ratios to ours within a round."""
    lines: list[str] = []
    for part in report.streams:
        if not part.rounds:
            continue
        lines += ["", *head([STREAM_TITLES[part.part], "MB/s", "cycles of the switch per byte", "our rate, ratio"])]
        for name, title in part.titles.items():
            rate = part.figures(name, lambda turn: turn.rate)
            cycles = part.figures(name, lambda turn: turn.cycles)
            ratio = part.ratio(OUR_STREAMS, name, lambda turn: turn.rate)
            lines.append(
                row(
                    [
                        title,
                        f"{rate.median / 1e6:.0f}" if rate else "-",
                        f"{cycles.median:.2f}" if cycles else "-",
                        "1" if name == OUR_STREAMS else _spread(ratio),
                    ]
                )
            )
        turns = [turn for turns in part.rounds for turn in turns.values()]
        lines += ["", f"{sum(t.compared for t in turns):,} bytes compared, {sum(t.damaged for t in turns):,} damaged."]
    return lines[1:]


def latency(report: Report) -> list[str]:
    """Percentiles of latency by rate and back-end: medians over the rounds."""
    lines = head(["latency p50 / p99, us", *report.titles.values(), "rounds"])
    for cell in report.cells:
        if not cell.rounds or cell.part != "latency":
            continue
        _, rounds = summary.choose(cell.rounds)
        words = []
        for name in report.titles:
            middle, tail = (
                summary.spread(
                    found[percentile]
                    for slots in rounds
                    if name in slots and (found := slots[name].latency_us) and percentile in found
                )
                for percentile in ("p50", "p99")
            )
            words.append(f"{middle.median:.2f} / {tail.median:.2f}" if middle and tail else "-")
        lines.append(row([f"{cell.load.rate / 1e6:g} Mpps", *words, str(len(rounds))]))
    return lines if len(lines) > 2 else []


def footprint(report: Report) -> list[str]:
    """Memory, idle CPU and time to the first packet."""
    if not report.footprints:
        return []
    names = [name for name in report.titles if name in report.footprints]
    prints = [report.footprints[name] for name in names]
    return [
        *head(["two connected ports", *(report.titles[name] for name in names)]),
        row(["resident memory, guests' not counted", *(f"{p.own_small / 1e6:.0f} MB" for p in prints)]),
        row(["hugepages of its own", *(f"{p.own_huge / 1e6:.0f} MB" for p in prints)]),
        row(["CPU, no traffic", *(f"{p.cpu_idle:.1%}" for p in prints)]),
        row(["CPU, 10,000 packets a second", *(f"{p.cpu_10k:.1%}" for p in prints)]),
        row(["process start to first forwarded packet", *(f"{p.first_packet_median:.2f} s" for p in prints)]),
    ]


def crowd(report: Report) -> list[str]:
    """Memory with many ports."""
    return [
        f"{size / 1e6:.0f} MB are resident with {CrowdedViaduct.ports} connected ports, guests' memory not counted."
        for name, size in report.crowded_memory.items()
        if name == CrowdedViaduct.name
    ]


def second_poller(report: Report) -> list[str]:
    """What two pollers carry in terms of one."""
    found = pollers.gain(report.pollers)
    if found is None:
        return []
    return [f"Two pollers on port pairs of their own carry {_spread(found)} times as much as one ({found.n} rounds)."]


def against_targets(report: Report) -> list[str]:
    """Each target with what was measured, and what bounds those that are missed."""
    found = targets.rows(report)
    return [*head(["target", "limit", "measured", "verdict"]), *map(row, found)] if found else []


def verification(report: Report) -> list[str]:
    """What became of the frames, in one sentence for each back-end."""
    lines = []
    for name, title in report.titles.items():
        slots = [slots[name] for cell in report.cells for slots in cell.rounds if name in slots]
        sent, lost = sum(s.sent for s in slots), sum(s.lost for s in slots)
        checked, corrupt = sum(s.checked for s in slots), sum(s.corrupt for s in slots)
        disordered = sum(s.disordered for s in slots)
        share = lost / sent if sent else 0
        lines.append(
            f"- {title}: {sent:,} frames sent, {lost:,} ({share:.3%}) not delivered; {checked:,} verified byte for "
            f"byte, {corrupt:,} damaged, {disordered:,} out of order."
        )
    return lines


def _provenance(report: Report) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report.machine.versions.items())
    yield (
        f"Measured {report.date} by `make bench{'' if report.suite == 'full' else '-' + report.suite}` in "
        f"{report.seconds / 60:.0f} minutes on {report.machine.cpus} x {report.machine.processor}, "
        f"Linux {report.machine.kernel}; {versions}. One core forwards, one generates and receives; back-ends take "
        f"turns within the same second; medians, ratios within a round with 10th and 90th percentile, of rounds in "
        f"which both cores shared a cache and nobody else ran, unless marked."
    )
    if any(summary.choose(cell.rounds)[0] != "near, undisturbed" for cell in report.cells if cell.rounds):
        yield ""
        yield (
            "\\* other programs ran meanwhile; \\*\\* the cores shared no cache at any time, \\*\\*\\* or not always: "
            "compare the ratios only."
        )


def whole(report: Report) -> str:
    """Everything, for bench/results/SUITE.md and docs/performance.md."""
    parts = [
        list(_provenance(report)),
        against_targets(report),
        throughput(report, "modes"),
        throughput(report, "stations"),
        latency(report),
        *(variants(report, part) for part in VARIANTS),
        streams(report),
        footprint(report),
        crowd(report),
        second_poller(report),
        verification(report),
        [f"- FAILED: {failure.splitlines()[0]}" for failure in report.failures],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def excerpt(report: Report, plot: str) -> str:
    """For the README: the smallest frames and the footprint."""
    parts = [
        [f"![Cycles per packet by ring mode]({plot})"],
        throughput(report, "modes", size=64),
        footprint(report),
        list(_provenance(report)),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def insert(page: Path, text: str) -> bool:
    """Replace what stands between the markers of a page. False if it has none."""
    content = page.read_text() if page.exists() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    return True
