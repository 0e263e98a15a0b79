"""A running switch is replaced by a new process, over and over, under traffic: no frame is lost, the gap is short."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
from interop.back_end import PortSpec
from interop.peer_process import PeerProcess
from interop.viaduct_switch import ViaductSwitch

from soak.conftest import Soak
from soak.half_upgrade import STEPS
from soak.steady import SteadyPair

RATE, LONG_RATE = 10_000, 100_000
GAP = 50
"""Milliseconds."""
PAUSE = 0.3
HALF_UPGRADE = Path(__file__).with_name("half_upgrade.py")


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_under_load(directory: Path, soak: Soak, ring: str) -> None:
    names = ("left", "right")
    switch = ViaductSwitch(directory, [PortSpec(name, directory / f"{name}.sock") for name in names])
    switch.start()
    try:
        left, right = (directory / f"{name}.sock" for name in names)
        # Room for what arrives while nobody forwards and this machine does other things.
        with SteadyPair(left, right, soak.of(RATE, LONG_RATE), ring=ring, queue_size=32768) as pair:
            gaps = []
            for _ in soak.rounds(6, 50):
                time.sleep(soak.random.uniform(0, PAUSE))
                gaps.append(switch.upgrade())
            drops = [
                queue["drops"] for port in switch.statistics()["ports"] for queue in port["queues"] if queue["drops"]
            ]
            assert not drops, "the switch has lost frames"
            report = pair.check()
            received = {port["name"]: port["queues"] for port in switch.statistics()["ports"]}
            counted = sum(queue["frames"] for queue in received["right"] if queue["direction"] == "sent")
        assert counted >= report.received, "the counters go on where they were"
        soak.measured("frames, none lost", report.received)
        soak.measured("longest gap of forwarding", 1000 * max(gaps), "ms", limit=GAP)
        assert report.latency is not None
        soak.measured("longest way of a frame", report.latency.max_us / 1000, "ms")
        switch.stop()
    finally:
        switch.kill()


def fail_at(step: str, switch: ViaductSwitch, log: Path) -> None:
    """A process begins to take over and dies."""
    new = PeerProcess(log.stem, [sys.executable, HALF_UPGRADE, str(switch.control), step], log)
    try:
        new.wait_for(lambda: not new.running(), "its death")
    finally:
        new.kill()
    assert new.process.returncode == -signal.SIGKILL, new.tail()


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_new_process_that_fails(directory: Path, soak: Soak, ring: str) -> None:
    """At whichever step it fails the old process goes on, and loses nothing unless the new one had begun to forward."""
    switch = ViaductSwitch(directory, [PortSpec(name, directory / f"{name}.sock") for name in ("left", "right")])
    switch.start()
    try:
        left, right = directory / "left.sock", directory / "right.sock"
        with SteadyPair(left, right, RATE, ring=ring, queue_size=32768) as pair:
            # The old process waits ten seconds for one that is silent.
            steps = [step for _ in soak.rounds(1, 10) for step in STEPS if soak.long or step != "silent"]
            for number, step in enumerate(steps, 1):
                before = pair.report()
                fail_at(step, switch, directory / f"{step}-{number}.log")
                switch.running_process().wait_for_output(" upgrade-failed: ", number)
                after = pair.settle()
                assert after.corrupted == 0
                if step not in ("started", "silent"):
                    assert (after.lost, after.duplicated) == (before.lost, before.duplicated), step
            # A real one succeeds after all of these.
            switch.upgrade()
            pair.settle()
            assert pair.reconnects() == 0
        switch.stop()
    finally:
        switch.kill()
