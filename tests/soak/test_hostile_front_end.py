"""Malicious front-ends on two ports of a running switch: the others lose no frame, and nothing hangs, ends or stays.

The front-ends are processes of their own (`soak.hostile_session`); their two ports form a VLAN, so that what they send
reaches a port that is as bad as they are. Meanwhile a pair of honest guests counts and checks frames, and somebody asks
the switch for its statistics all the time and measures how long the answers take.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from interop.back_end import PortSpec
from interop.peer_process import PATIENCE, PeerProcess, wait_until
from interop.viaduct_switch import ViaductSwitch

from soak.conftest import Soak
from soak.steady import SteadyPair
from viaduct.switch.control_client import ControlClient

RATE, LONG_RATE = 5_000, 20_000
TESTS = Path(__file__).parents[1]
HANG = 1.0
"""Seconds within which the switch has to answer."""


class Heartbeat:
    """Asks the switch for its statistics all the time, and remembers the longest time that an answer took."""

    def __init__(self, control: Path) -> None:
        self.longest = 0.0
        self.answers = 0
        self.failure: BaseException | None = None
        self._control = control
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def _beat(self) -> None:
        try:
            with ControlClient(self._control) as client:
                while not self._stop.wait(0.02):
                    begun = time.monotonic()
                    client.call("stats")
                    self.longest = max(self.longest, time.monotonic() - begun)
                    self.answers += 1
        except BaseException as failure:
            self.failure = failure

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)


def test_others_do_not_notice(directory: Path, soak: Soak) -> None:
    """Two malicious front-ends at a time, a few hundred sessions or ten thousand."""
    names = ("steady0", "steady1", "bad0", "bad1")
    sockets = {name: directory / f"{name}.sock" for name in names}
    ports = [PortSpec(name, sockets[name], link=int(name.startswith("bad"))) for name in names]
    switch = ViaductSwitch(directory, ports)
    switch.start()
    sessions = soak.of(150, 5_000)
    seed = soak.random.getrandbits(32)
    soak.say(f"2 x {sessions} sessions; seeds {seed} and {seed + 1}")
    front_ends: list[PeerProcess] = []
    try:
        with SteadyPair(sockets["steady0"], sockets["steady1"], soak.of(RATE, LONG_RATE)) as pair:
            with Heartbeat(switch.control) as heart:
                wait_until(lambda: heart.answers, "the first answer")
                before = switch.resources()
                for number in range(2):
                    path, log = sockets[f"bad{number}"], directory / f"bad{number}.log"
                    command = [sys.executable, "-m", "soak.hostile_session", str(path)]
                    command += ["--seed", str(seed + number), "--sessions", str(sessions)]
                    environment = {"PYTHONPATH": str(TESTS)}
                    front_ends.append(PeerProcess(f"bad{number}", command, log, environment))
                for front_end in front_ends:
                    patience = soak.of(300, 5 * 3600)
                    front_end.wait_for_output("no more sessions", seconds=patience)
                    status = front_end.process.wait(PATIENCE)
                    assert status == 0, front_end.tail()
                assert switch.running_process().running(), switch.running_process().tail()
                wait_until(lambda: switch.resources() == before, f"nothing is left of them, again {before}")
            assert heart.failure is None, heart.failure
            report = pair.check()
        # Where they were, honest guests work.
        with SteadyPair(sockets["bad0"], sockets["bad1"], RATE, number=1) as pair:
            pair.check()
        switch.stop()
    finally:
        for front_end in front_ends:
            front_end.kill()
        switch.kill()
    assert report.latency is not None
    soak.measured("frames of the others, none lost", report.received)
    soak.measured("their longest way", report.latency.max_us / 1e6, "s", limit=HANG)
    soak.measured("longest of the switch's answers", heart.longest, "s", limit=HANG)
