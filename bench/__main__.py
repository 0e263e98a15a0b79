"""The command line of the benchmark: `python -m bench [--quick]` measures, `python -m bench --report` only redraws."""

import argparse
import signal
import sys
from pathlib import Path

import msgspec

from bench import report, suite, table, viaduct
from bench.hugepages import HugepageError
from bench.process import ProgramError
from bench.programs import BuildError
from bench.report import RESULTS, Report

ROOT = Path(__file__).parent.parent


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cells and rounds: under three minutes")
    parser.add_argument("--report", action="store_true", help="measure nothing: tables and plots from the last results")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the last run: cells that found the cores apart"
    )
    parser.add_argument("--minutes", type=float, help="how long to try again where the cores were apart")
    parser.add_argument("--backends", default=None, help=f"some of {','.join(suite.BACK_ENDS)}; all peers and Viaduct")
    parser.add_argument("--mode", action="append", help="only this ring mode (may be repeated)")
    parser.add_argument(
        "--part", action="append", help="only this part: modes, stations, latency, adaptive, pages, ports"
    )
    parser.add_argument("--verbose", action="store_true", help="print each round")
    return parser.parse_args()


def _publish(results: Report) -> None:
    """Write tables and plots, and put them into the pages that have a place for them."""
    from bench import plots  # needs matplotlib, which measuring does not

    text = table.whole(results)
    (RESULTS / f"{results.suite}.md").write_text(text)
    drawn = plots.all_of(results)
    if results.suite == "full":
        plot = next((str(path.relative_to(ROOT)) for path in drawn if path.name == "full-modes.svg"), "")
        table.insert(ROOT / "README.md", table.excerpt(results, plot))
        table.insert(ROOT / "docs" / "performance.md", text)
    print(text)


def _measure(arguments: argparse.Namespace) -> Report:
    plan = suite.QUICK if arguments.quick else suite.FULL
    if arguments.minutes is not None:
        plan = msgspec.structs.replace(plan, budget=arguments.minutes * 60)
    cells = tuple(
        cell
        for cell in plan.cells
        if (not arguments.mode or cell[1] in arguments.mode) and (not arguments.part or cell[0] in arguments.part)
    )
    selected = len(cells) < len(plan.cells) or arguments.backends is not None
    names = arguments.backends.split(",") if arguments.backends else list(suite.DEFAULT_BACK_ENDS)
    if unknown := [name for name in names if name not in suite.BACK_ENDS]:
        raise ProgramError(f"there is no back-end {unknown[0]!r}; there are {', '.join(suite.BACK_ENDS)}")
    if viaduct.command() is None and any(name.startswith("viaduct") for name in names):
        raise ProgramError("there is no `viaduct` beside this Python or in PATH: make dev; or --backends testpmd,ovs")

    def say(line: str) -> None:
        if arguments.verbose or not line.startswith(tuple(names)):
            print(line, file=sys.stderr, flush=True)

    chosen = msgspec.structs.replace(plan, cells=cells)
    if arguments.resume:
        return suite.resume(chosen, report.load(plan.name), say)
    # A selection gets a file of its own: it must not replace the results of a whole run.
    if selected:
        chosen = msgspec.structs.replace(chosen, name="selection")
    return suite.run(chosen, names, say)


def _end(*_: object) -> None:
    """SIGTERM: leave as after ^C, so that back-ends are ended and hugepages given back."""
    raise KeyboardInterrupt


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _end)
    try:
        if arguments.report:
            results = report.load("quick" if arguments.quick else "full")
        else:
            results = _measure(arguments)
            results.save()
        _publish(results)
    except KeyboardInterrupt:
        print("bench: interrupted; `--resume` goes on from what is saved", file=sys.stderr)
        return 130
    except (ProgramError, BuildError, HugepageError, FileNotFoundError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    damaged = sum(slot.corrupt for cell in results.cells for slots in cell.rounds for slot in slots.values())
    return 1 if results.failures or damaged else 0


if __name__ == "__main__":
    sys.exit(main())
