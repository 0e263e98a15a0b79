"""Where a guest's time goes: its exits by reason, port or address, and device, with their number and time.

Two readings of a machine's counters and what lies between them, as a table; `viaduct run --trace exits` prints one
every five seconds and one over everything at the end. Reading costs a running guest nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.table import Table

    from viaduct._core import Vm

POSTED = "posted write"
"""The reason of writes that came along with an exit and were none themselves."""
Place: TypeAlias = tuple[str, int | None, str]
"""Reason, port or address, device."""


@dataclass(frozen=True, slots=True)
class Row:
    """The exits of one kind."""

    reason: str
    address: int | None
    device: str
    count: int
    seconds: float

    @property
    def microseconds_each(self) -> float:
        """Mean time until the answer was there."""
        return self.seconds * 1e6 / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Exits:
    """A machine's exits, over all its vCPUs, at one moment or between two."""

    counts: dict[Place, tuple[int, int]] = field(default_factory=dict)
    """Number and nanoseconds."""
    guest_nanoseconds: int = 0

    @classmethod
    def of(cls, vm: Vm) -> Exits:
        """What has been counted until now."""
        return cls.summed(vm.exits(), vm.guest_time())

    @classmethod
    def summed(cls, rows: Iterable[tuple[int, str, int | None, str, int, int]], guest: Iterable[int]) -> Exits:
        """Rows and times as `Vm.exits` and `Vm.guest_time` give them, of all vCPUs together."""
        counts: dict[Place, tuple[int, int]] = {}
        for _, reason, address, device, count, nanoseconds in rows:
            before = counts.get((reason, address, device), (0, 0))
            counts[reason, address, device] = (before[0] + count, before[1] + nanoseconds)
        return cls(counts, sum(guest))

    def since(self, before: Exits) -> Exits:
        """What was counted after `before`."""
        counts = {}
        for place, (count, nanoseconds) in self.counts.items():
            old_count, old_nanoseconds = before.counts.get(place, (0, 0))
            if count > old_count:
                counts[place] = (count - old_count, nanoseconds - old_nanoseconds)
        return Exits(counts, self.guest_nanoseconds - before.guest_nanoseconds)

    def rows(self) -> list[Row]:
        """Those that took most time first."""
        rows = [Row(*place, count, nanoseconds / 1e9) for place, (count, nanoseconds) in self.counts.items()]
        return sorted(rows, key=lambda row: (-row.seconds, row.reason, row.address or 0, row.device))

    @property
    def total(self) -> int:
        """The number of all exits, without what came along with one."""
        return sum(count for (reason, _, _), (count, _) in self.counts.items() if reason != POSTED)

    def table(self, limit: int | None = None) -> Table:
        """The rows for a terminal, at most `limit` of them, and what they come to."""
        from rich.table import Table  # which most machines never show

        table = Table(title="exits", title_justify="left")
        for name in ("reason", "address", "device"):
            table.add_column(name)
        for name in ("count", "ms", "µs each"):
            table.add_column(name, justify="right")
        rows = self.rows()
        for row in rows[:limit]:
            table.add_row(
                row.reason,
                "" if row.address is None else f"{row.address:#x}",
                row.device or ("nobody" if row.address is not None else ""),
                str(row.count),
                f"{row.seconds * 1e3:.2f}",
                f"{row.microseconds_each:.2f}",
            )
        shown = rows[: len(rows) if limit is None else limit]
        if rest := rows[len(shown) :]:
            seconds, count = sum(row.seconds for row in rest), sum(row.count for row in rest)
            table.add_row(
                f"{len(rest)} more", "", "", str(count), f"{seconds * 1e3:.2f}", f"{seconds * 1e6 / count:.2f}"
            )
        table.add_section()
        outside = sum(row.seconds for row in rows)
        table.add_row("all", "", "", str(self.total), f"{outside * 1e3:.2f}", "")
        table.add_row("in the guest, or waiting there", "", "", "", f"{self.guest_nanoseconds / 1e6:.2f}", "")
        return table
