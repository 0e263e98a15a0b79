"""The history of events: bounded, numbered, and no follower costs the switch memory."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from viaduct.switch.event_log import HISTORY, EventLog


def test_the_oldest_are_forgotten_and_the_numbers_tell() -> None:
    log = EventLog()
    for number in range(HISTORY + 10):
        log.add("link-up", f"number {number}")
    kept = log.history()
    assert len(kept) == HISTORY
    assert [event.sequence for event in kept] == list(range(11, HISTORY + 11))
    assert log.counts == {"link-up": HISTORY + 10}


def test_levels_follow_the_kind() -> None:
    log = EventLog()
    assert log.add("port-broken", "").level == "error"
    assert log.add("peer-refused", "").level == "warning"
    assert log.add("link-up", "").level == "info"


def test_history_of_one_port_and_since_a_moment() -> None:
    log = EventLog()
    log.add("link-up", "", "a")
    log.add("link-up", "", "b")
    assert [event.port for event in log.history(port="b")] == ["b"]
    assert log.history(since=time.time() + 1) == ()
    assert len(log.history(since=log.history()[0].time)) == 2


async def test_a_follower_that_does_not_read_loses_the_oldest() -> None:
    log = EventLog()
    log.add("link-up", "before")
    async with aclosing(log.follow()) as events:
        assert (await anext(events)).message == "before"
        for number in range(3 * HISTORY):
            log.add("link-up", f"number {number}")
        seen = [await anext(events) for _ in range(HISTORY)]
        assert [event.sequence for event in seen] == list(range(2 * HISTORY + 2, 3 * HISTORY + 2))
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        assert not waiting.done()
        log.add("link-up", "last")
        assert (await waiting).message == "last"
