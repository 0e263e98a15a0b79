"""A virtual machine of ours beside QEMU's microvm: start to init, memory, exits, block reads, TCP streams.

`python -m bench.machine` (make bench-machine, and the end of make bench) measures in the lab (docs/lab.md), where both
run on the same emulated hardware with KVM, turn by turn within one boot of it. A whole run writes
bench/results/machine.json and the table in docs/performance.md, which says what is measured and how. The lab's
processor is emulated, so that times say nothing about a real one, and only the ratios within a round count; exits and
memory are what they are anywhere.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from bench import summary, table
from bench.report import RESULTS
from bench.summary import Spread

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench-machine -->", "<!-- /bench-machine -->"
OURS, PEER = "viaduct", "qemu"
MEASURES = ("start", "block", "stream", "stream+vhost-net")
ROUNDS, QUICK_ROUNDS = 5, 2
PATIENCE_S = 7200


class Figure(msgspec.Struct, frozen=True):
    """One row: what is measured, its field, how it is written, whether less is better, and what the ratio may be."""

    title: str
    measure: str
    field: str
    scale: float
    unit: str
    less: bool
    limit: float

    def verdict(self, ratio: float) -> str:
        """Whether a ratio is what was wanted, and if not by how much."""
        missed = ratio / self.limit - 1 if self.less else 1 - ratio / self.limit
        return "met" if missed <= 0 else f"**missed by {missed:.0%}**"


FIGURES = (
    Figure("start to init, s", "start", "seconds", 1, "", True, 0.9),
    Figure("resident beyond the guest's memory, MB", "start", "resident", 1e-6, "", True, 1.0),
    Figure("the same, what is shared divided by its users, MB", "start", "proportional", 1e-6, "", True, 1.0),
    Figure("exits per boot", "start", "exits", 1, "", True, 1.0),
    Figure("4 KiB random reads a second, 8 at once", "block", "iops", 1, "", False, 1.0),
    Figure("TCP from the guest, tap, MB/s", "stream", "out", 1e-6, "", False, 1.0),
    Figure("TCP to the guest, tap, MB/s", "stream", "into", 1e-6, "", False, 1.0),
    Figure("TCP from the guest, vhost-net, MB/s", "stream, vhost-net", "out", 1e-6, "", False, 1.0),
    Figure("TCP to the guest, vhost-net, MB/s", "stream, vhost-net", "into", 1e-6, "", False, 1.0),
)


class Results(msgspec.Struct):
    """All turns as bench.machine_rounds has printed them."""

    date: str
    versions: dict[str, str]
    turns: list[dict[str, float | int | str]]

    def values(self, figure: Figure, monitor: str) -> dict[int, float]:
        """One figure by round."""
        return {
            int(turn["round"]): float(turn[figure.field])
            for turn in self.turns
            if turn["measure"] == figure.measure and turn["monitor"] == monitor and figure.field in turn
        }

    def ratio(self, figure: Figure) -> Spread | None:
        """Ours divided by the peer's, over the rounds in which both had their turn."""
        ours, peers = self.values(figure, OURS), self.values(figure, PEER)
        return summary.spread(ours[turn] / peers[turn] for turn in sorted(ours.keys() & peers.keys()))


def measure(rounds: int, measures: str) -> Results:
    """Boot the lab and let both have their turns in it. Raises SystemExit if that fails."""
    command = [sys.executable, "-m", "lab", "run", "--seconds", str(PATIENCE_S), "--", "sh", "-c"]
    script = (
        "qemu-system-x86_64 --version | head -n1; uname -r; "
        f"exec python3 -m bench.machine_rounds --rounds {rounds} --measures {measures}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    lines = []
    with subprocess.Popen([*command, script], stdout=subprocess.PIPE, text=True, env=environment) as lab:
        assert lab.stdout is not None
        for line in lab.stdout:
            print(line.strip(), file=sys.stderr, flush=True)
            lines.append(line)
    if lab.returncode:
        raise SystemExit(f"bench: the lab left with status {lab.returncode}")
    from viaduct import __version__

    versions = {"QEMU": lines[0].split()[3], "Linux": lines[1].strip(), "Viaduct": __version__}
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return Results(date, versions, [json.loads(line) for line in lines[2:]])


def _cell(values: Spread | None, scale: float) -> str:
    if values is None:
        return "-"
    median, low, high = (f"{value * scale:,.{0 if value * scale >= 100 else 1}f}" for value in _ends(values))
    return f"{median} [{low}-{high}]"


def _ends(values: Spread) -> tuple[float, float, float]:
    return values.median, values.low, values.high


def text(results: Results) -> str:
    """The table and where it comes from."""
    lines = table.head(["", "Viaduct", "QEMU microvm", "ratio", "wanted", "", "rounds"])
    for figure in FIGURES:
        if (ratio := results.ratio(figure)) is None:
            continue
        cells = [figure.title]
        cells += [_cell(summary.spread(results.values(figure, who).values()), figure.scale) for who in (OURS, PEER)]
        cells.append("{:.2f} [{:.2f}-{:.2f}]".format(*_ends(ratio)))
        cells += [f"at {'most' if figure.less else 'least'} {figure.limit:g}", figure.verdict(ratio.median)]
        lines.append(table.row([*cells, str(ratio.n)]))
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    source = (
        f"Measured {results.date} by `make bench-machine` in one run of the lab; {versions}. Medians with 10th and "
        "90th percentile; ratios are taken within a round."
    )
    return "\n".join([*lines, "", source, ""])


def insert(page: Path, content: str) -> None:
    """Put the table between its markers, if the page has them."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        page.write_text(f"{before}{BEGIN}\n{content}{END}{after}")


def main() -> int:
    """Measure, or only write the table again."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine", description=__doc__)
    parser.add_argument("--rounds", type=int, help=f"turns of each at each measure [{ROUNDS}]")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, and only the table on the screen")
    parser.add_argument("--measures", default=",".join(MEASURES), help="some of them; then only on the screen as well")
    parser.add_argument("--json", action="store_true", help="print every turn as JSON instead of the table")
    parser.add_argument("--report", action="store_true", help="measure nothing: the table from the last results")
    arguments = parser.parse_args()
    file = RESULTS / "machine.json"
    if arguments.report:
        results = msgspec.json.decode(file.read_bytes(), type=Results)
    else:
        results = measure(arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS), arguments.measures)
    whole = not arguments.quick and arguments.measures == ",".join(MEASURES)
    if whole:
        if not arguments.report:
            file.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
        insert(PAGE, text(results))
    print(msgspec.json.encode(results).decode() if arguments.json else text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
