"""Plots from a report, as PNG and SVG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench import summary
from bench.generator import RING_MODES
from bench.interleave import Slot
from bench.report import RESULTS, Cell, Report
from bench.suite import VARIANTS

_COLOURS = {"testpmd": "#7a8ba3", "ovs": "#c8a24a", "viaduct": "#1f7a5c", "viaduct-adaptive": "#7fc4a8"}


def _bars(
    axes: Any, report: Report, cells: Sequence[Cell], labels: Sequence[str], value: Callable[[Slot], float]
) -> None:
    """One group of bars for each cell, one bar for each back-end, with the 10th to 90th percentile as a line."""
    names = list(report.titles)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        spreads = [summary.figures(summary.choose(cell.rounds)[1], name, value) for cell in cells]
        places = [group + (index - (len(names) - 1) / 2) * width for group in range(len(cells))]
        heights = [s.median if s else 0 for s in spreads]
        below = [s.median - s.low if s else 0 for s in spreads]
        above = [s.high - s.median if s else 0 for s in spreads]
        axes.bar(places, heights, width * 0.92, label=report.titles[name], color=_COLOURS.get(name))
        axes.errorbar(places, heights, yerr=[below, above], fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        for place, height in zip(places, heights, strict=True):
            axes.annotate(f"{height:.0f}", (place, 0), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(cells)), labels, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.margins(y=0.15)  # room for the legend


def _save(figure: Any, name: str) -> list[Path]:
    figure.tight_layout()
    paths = []
    for kind in ("png", "svg"):
        path = RESULTS / f"{name}.{kind}"
        figure.savefig(path, dpi=130, metadata={"Date": None} if kind == "svg" else None)
        paths.append(path)
    plt.close(figure)
    return paths


def _direction(cell: Cell) -> str:
    return "both" if cell.load.both else "one way"


def modes(report: Report) -> list[Path]:
    """Cycles per packet and packets per second of the smallest frames, by ring mode and direction."""
    cells = [cell for cell in report.cells if cell.rounds and cell.part == "modes" and cell.load.size == 64]
    if not cells:
        return []
    labels = [f"{RING_MODES[c.mode].title.replace(', ', chr(10))}\n{_direction(c)}" for c in cells]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(10, 7))
    _bars(upper, report, cells, labels, lambda slot: slot.cycles)
    upper.set_ylabel("busy cycles per packet (less is better)")
    upper.set_title("64-byte frames between two guests through one core")
    upper.legend(frameon=False, ncols=len(report.titles))
    _bars(lower, report, cells, labels, lambda slot: slot.rate / 1e6)
    lower.set_ylabel("million packets per second")
    return _save(figure, f"{report.suite}-modes")


def sizes(report: Report) -> list[Path]:
    """Cycles per packet by frame size."""
    cells = [cell for cell in report.cells if cell.rounds and cell.part == "modes" and not cell.load.both]
    if len({cell.load.size for cell in cells}) < 2:
        return []
    labels = [f"{RING_MODES[c.mode].title.replace(', ', chr(10))}\n{c.load.size} B" for c in cells]
    figure, axes = plt.subplots(figsize=(max(6, len(cells)), 4))
    _bars(axes, report, cells, labels, lambda slot: slot.cycles)
    axes.set_ylabel("busy cycles per packet")
    axes.set_title("By frame size, one direction")
    axes.legend(frameon=False, ncols=len(report.titles))
    return _save(figure, f"{report.suite}-sizes")


def stations(report: Report) -> list[Path]:
    """Cycles per packet over the number of source addresses."""
    cells = [cell for cell in report.cells if cell.rounds and cell.part == "stations"]
    if not cells:
        return []
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, title in report.titles.items():
        points = [
            (cell.load.sources, found.median)
            for cell in cells
            if (found := summary.figures(summary.choose(cell.rounds)[1], name, lambda slot: slot.cycles))
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=title, color=_COLOURS.get(name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("source addresses")
    axes.set_ylabel("busy cycles per packet")
    axes.legend(frameon=False)
    axes.grid(linewidth=0.4)
    return _save(figure, f"{report.suite}-stations")


def ports(report: Report) -> list[Path]:
    """Cycles per packet of our switch over the number of its ports, of which two carry traffic."""
    figure, axes = plt.subplots(figsize=(6, 4))
    drawn = False
    for part, colour in (("ports", _COLOURS["viaduct-adaptive"]), ("ports, busy", _COLOURS["viaduct"])):
        for cell in (cell for cell in report.cells if cell.rounds and cell.part == part):
            rounds = summary.choose(cell.rounds)[1]
            points = [
                (kind.ports, found.median)
                for kind in VARIANTS[part]
                if (found := summary.figures(rounds, kind.name, lambda slot: slot.cycles))
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="o", label="busy" if "busy" in part else "adaptive", color=colour
                )
                drawn = True
    if not drawn:
        plt.close(figure)
        return []
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("connected ports, two of them with traffic")
    axes.set_ylabel("busy cycles per packet")
    axes.legend(frameon=False, title="polling")
    axes.grid(linewidth=0.4)
    return _save(figure, f"{report.suite}-ports")


def latency(report: Report) -> list[Path]:
    """The distribution of latency at each rate: medians over the rounds of each percentile."""
    cells = [cell for cell in report.cells if cell.rounds and cell.part == "latency"]
    if not cells:
        return []
    figure, panels = plt.subplots(1, len(cells), figsize=(4 * len(cells), 4), sharey=True, squeeze=False)
    for axes, cell in zip(panels[0], cells, strict=True):
        rounds = summary.choose(cell.rounds)[1]
        for name, title in report.titles.items():
            slots = [found for r in rounds if name in r and (found := r[name].latency_us)]
            shares = sorted({key for slot in slots for key in slot}, key=lambda key: float(key[1:]))
            values = [summary.spread(slot[key] for slot in slots if key in slot) for key in shares]
            axes.plot(
                [value.median for value in values if value],
                [key[1:] for key in shares],
                marker=".",
                label=title,
                color=_COLOURS.get(name),
            )
        axes.set_xscale("log")
        axes.set_xlabel("microseconds")
        axes.set_title(f"{cell.load.rate / 1e6:g} Mpps")
        axes.grid(linewidth=0.4)
    panels[0][0].set_ylabel("percentile")
    panels[0][0].legend(frameon=False, fontsize=8)
    return _save(figure, f"{report.suite}-latency")


def all_of(report: Report) -> list[Path]:
    """Every plot the report has data for."""
    return [path for plot in (modes, sizes, stations, ports, latency) for path in plot(report)]
