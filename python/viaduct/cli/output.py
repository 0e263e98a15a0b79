"""Showing things: a table on a terminal, plain aligned lines elsewhere, JSON where asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: Any) -> None:
    """One line of JSON, at once."""
    import msgspec

    print(msgspec.json.encode(value).decode(), flush=True)


def print_rows(
    headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), empty: str = ""
) -> None:
    """Rows under headings; the columns in `numbers` are aligned right. `empty` is for a terminal without rows."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(headings, rows, numbers) if rows else empty, highlight=False)
        return
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    for row in (headings, *rows):
        cells = (
            text.rjust(width) if column in numbers else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip(), flush=True)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> Table:
    """The same rows as a table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(headings):
        made.add_column(heading.lower(), justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return made


_STYLES = {"up": "green", "down": "yellow", "broken": "bold red"}


def count(number: float) -> str:
    """A large number for people: 999, 12.3 k, 4.56 M."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(number) < 999.5 or unit == " T":
            break
        number /= 1000
    if unit == "":
        return f"{number:.0f}"
    return (
        f"{number:.2f}{unit}" if number < 9.995 else f"{number:.1f}{unit}" if number < 99.95 else f"{number:.0f}{unit}"
    )


def drops(reasons: dict[str, int]) -> str:
    """Drops by reason, the most frequent first: `12 no_buffers, 1 runt`."""
    return (
        ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items(), key=lambda item: -item[1])) or "0"
    )
