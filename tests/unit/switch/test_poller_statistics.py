"""What pollers count of their own work, and how it is shown."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from viaduct.cli.poller_rates import POLLERS, SIZES, poller_rates
from viaduct.switch.config import SwitchConfig
from viaduct.switch.status import PollerStatistics, Statistics
from viaduct.switch.switch import Switch

from .test_switch import ALICE, BROADCAST, ethernet, until, write_pcap


async def test_frames_batches_and_wakeups_are_counted(tmp_path: Path) -> None:
    frames = [ethernet(BROADCAST, ALICE, bytes([n])) for n in range(150)]
    async with Switch(SwitchConfig(polling="interrupt")) as switch:
        await switch.add_port("hole", "null")
        await switch.add_port("player", f"pcap:{write_pcap(tmp_path / 'in.pcap', frames)}")
        await until(lambda: switch.stats().pollers[0].frames == len(frames))
        await until(lambda: switch.stats().pollers[0].active_queues == 0)
        (poller,) = switch.stats().pollers
        classes = range(len(poller.batches))
        assert len(poller.batches) == len(SIZES)
        assert sum(number << size for size, number in zip(classes, poller.batches, strict=True)) <= len(frames)
        assert sum(number << size + 1 for size, number in zip(classes, poller.batches, strict=True)) > len(frames)
        assert poller.busy_cycles > 0
        assert poller.busy_seconds > 0
        # Each frame of the recording has a time of its own, for which the poller sleeps, unless it is late.
        assert poller.wakeups <= poller.sleeps
        assert poller.sleeps > 0


async def test_a_sleeping_poller_is_not_woken_by_nothing() -> None:
    async with Switch() as switch:
        await until(lambda: switch.stats().pollers[0].sleeps > 0)
        before = switch.stats().pollers[0]
        await switch.add_port("hole", "null")
        await until(lambda: switch.stats().pollers[0].sleeps > before.sleeps)
        assert switch.stats().pollers[0].wakeups == 0, "control woke it, no frame"


def test_rates_are_what_was_done_between_two_looks() -> None:
    then = PollerStatistics(poller=0, cpu=3, frames=1000, rounds=10, busy_seconds=5, batches=(1000, 0, 0, 0, 0, 0, 0))
    now = PollerStatistics(
        poller=0,
        cpu=3,
        frames=1000 + 6400,
        rounds=20,
        wakeups=4,
        active_queues=1,
        queues=2,
        busy_seconds=6,
        idle_seconds=0.5,
        busy_cycles=640_000,
        batches=(1025, 0, 0, 0, 0, 0, 75),
    )
    (row,) = poller_rates(Statistics(time=10, pollers=(then,)), Statistics(time=12, pollers=(now,)))
    shown = dict(zip(POLLERS, row, strict=True))
    assert shown["POLLER"] == "0"
    assert shown["CPU"] == "3"
    assert shown["QUEUES"] == "2"
    assert shown["POLLED"] == "1"
    assert shown["LOAD"] == "50%"
    assert shown["SPIN"] == "25%"
    assert shown["FRAMES/S"] == "3.20 k"
    assert shown["CYCLES"] == "100"
    assert shown["WAKE-UPS/S"] == "2"
    assert shown["BATCHES BY SIZE"] == "1: 25%, 64: 75%"


def test_replaced_pollers_count_from_zero() -> None:
    then = PollerStatistics(poller=0, frames=1000, rounds=10, batches=(1000,))
    now = PollerStatistics(poller=0, frames=10, rounds=1, batches=(10,))
    (row,) = poller_rates(Statistics(time=1, pollers=(then,)), Statistics(time=2, pollers=(now,)))
    assert dict(zip(POLLERS, row, strict=True))["FRAMES/S"] == "10"


async def test_the_switch_tells_the_clock_by_which_rates_are_made() -> None:
    async with Switch() as switch:
        before = time.monotonic()
        await asyncio.sleep(0)
        assert before <= switch.stats().time <= time.monotonic()
