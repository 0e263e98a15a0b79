"""What pollers do with their time, as rows: since they started, or between two snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .output import count

if TYPE_CHECKING:
    from viaduct.switch.status import PollerStatistics, Statistics

SIZES = ("1", "2-3", "4-7", "8-15", "16-31", "32-63", "64")
"""The classes of batch sizes that pollers count (`BATCH_CLASSES` in crates/switch/src/poller_counters.rs)."""

POLLERS = ("POLLER", "CPU", "QUEUES", "POLLED", "LOAD", "SPIN", "FRAMES/S", "CYCLES", "WAKE-UPS/S", "BATCHES BY SIZE")
POLLERS_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8)


def poller_rates(before: Statistics, after: Statistics) -> list[tuple[str, ...]]:
    """A row for each poller.

    LOAD: part of the time in which it moved frames. SPIN: part in which it looked and found none; the rest it slept.
    CYCLES: busy time, divided by frames. BATCHES BY SIZE: how many in a hundred had 1 frame, 2-3, ... 64; large ones
    cost less for each frame and mean that frames come faster than they are fetched.
    """
    seconds = max(after.time - before.time, 1e-9)
    earlier = {poller.poller: poller for poller in before.pollers}
    return [_row(_since(earlier.get(poller.poller), poller), seconds) for poller in after.pollers]


def _since(old: PollerStatistics | None, new: PollerStatistics) -> PollerStatistics:
    """What was counted since `old`; all of it if the pollers were replaced meanwhile."""
    import msgspec

    if old is None or old.rounds > new.rounds or old.frames > new.frames:
        return new
    return msgspec.structs.replace(
        new,
        frames=new.frames - old.frames,
        wakeups=new.wakeups - old.wakeups,
        busy_seconds=new.busy_seconds - old.busy_seconds,
        idle_seconds=new.idle_seconds - old.idle_seconds,
        busy_cycles=new.busy_cycles - old.busy_cycles,
        batches=tuple(now - then for now, then in zip(new.batches, old.batches, strict=True)),
    )


def _row(poller: PollerStatistics, seconds: float) -> tuple[str, ...]:
    batches = sum(poller.batches)
    return (
        str(poller.poller),
        "any" if poller.cpu is None else str(poller.cpu),
        str(poller.queues),
        str(poller.active_queues),
        _percent(poller.busy_seconds / seconds),
        _percent(poller.idle_seconds / seconds),
        count(poller.frames / seconds),
        f"{poller.busy_cycles / poller.frames:.0f}" if poller.frames else "-",
        count(poller.wakeups / seconds),
        ", ".join(
            f"{size}: {_percent(number / batches)}"
            for size, number in zip(SIZES, poller.batches, strict=False)
            if number > 0
        )
        or "-",
    )


def _percent(part: float) -> str:
    """A part of one: 0%, 0.3%, 12%. Clocks differ by a little, so never more than all."""
    percent = min(100 * part, 100.0)
    return f"{percent:.1f}%" if 0.05 <= percent < 9.95 else f"{percent:.0f}%"
