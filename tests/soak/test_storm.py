"""A guest floods the others at line rate: a pair of others keeps its share of the switch, and its delays."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from interop.back_end import PortSpec
from interop.peer_process import PeerProcess, require, wait_until
from interop.viaduct_switch import ViaductSwitch

from soak.conftest import Soak
from soak.steady import SteadyPair
from viaduct.guest import Received

RATE, LONG_RATE = 5_000, 100_000
SHARE = 0.9
"""Of what the pair carries beside an honest neighbour."""
DELAY = 3
"""Times the pair's 99th percentile beside an honest neighbour."""
VLAN = 9
STRANGER = "02:00:00:00:00:77"
STORMS = {
    "broadcast": ("ff:ff:ff:ff:ff:ff", "", "storm"),
    "unknown": (STRANGER, ",unknown=10k", "unknown_flood"),
}
"""Where the frames go, the option that limits them (broadcasts have a limit without one), and why they are dropped."""


@contextmanager
def neighbour(socket: Path, destination: str, log: Path) -> Iterator[None]:
    """A guest that sends as fast as it can."""
    program = require(str(Path(sys.executable).parent / "viaduct"), "make, then run the tests in its .venv")
    words = [
        "send",
        "--connect",
        str(socket),
        "--dst",
        destination,
        "--mac",
        "02:00:00:00:00:66",
        "--seconds",
        "1000000",
    ]
    process = PeerProcess("neighbour", [program, *words], log)
    try:
        yield
    finally:
        process.kill()


def carried(switch: ViaductSwitch, port: str) -> tuple[int, dict[str, int]]:
    """Frames that came in from a port, and what of them was dropped."""
    (found,) = [each for each in switch.statistics()["ports"] if each["name"] == port]
    queues = [queue for queue in found["queues"] if queue["direction"] == "received"]
    drops: dict[str, int] = {}
    for queue in queues:
        for reason, count in queue.get("drops", {}).items():
            drops[reason] = drops.get(reason, 0) + count
    return sum(queue["frames"] for queue in queues), drops


def phase(left: Path, right: Path, rate: int, seconds: float, ring: str, check: bool) -> tuple[Received, float]:
    """The pair runs for a while. Returns what arrived, and how much of what should have arrived did."""
    # The storm's frames are in the same queue: room for them too while nobody lets the receiver run.
    with SteadyPair(left, right, rate, ring=ring, queue_size=32768) as pair:
        before, began = pair.report(), time.monotonic()
        time.sleep(seconds)
        after, ended = pair.report(), time.monotonic()
        share = (after.received - before.received) / (rate * (ended - began))
        return (pair.check() if check else after), share


@pytest.mark.parametrize("storm", STORMS)
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_others_keep_their_share(directory: Path, soak: Soak, ring: str, storm: str) -> None:
    """Nor does the pair lose a frame."""
    destination, option, reason = STORMS[storm]
    sockets = {name: directory / f"{name}.sock" for name in ("left", "right", "neighbour")}
    # The neighbour is in a VLAN, of which its frames carry the tag, so that the pair can tell them from its own. While
    # it is honest they end in a port that swallows them, known by its address.
    others = [
        f"neighbour=vhost-user:{sockets['neighbour']},vlan={VLAN}{option}",
        f"hole=null,vlan={VLAN},mac=02:00:00:00:00:55",
    ]
    switch = ViaductSwitch(directory, [PortSpec(name, sockets[name]) for name in ("left", "right")], others)
    switch.start()
    rate, seconds = soak.of(RATE, LONG_RATE), soak.of(2, 30)
    left, right = sockets["left"], sockets["right"]
    try:
        alone, alone_share = phase(left, right, rate, seconds, ring, check=False)
        with neighbour(sockets["neighbour"], "02:00:00:00:00:55", directory / "honest.log"):
            wait_until(lambda: carried(switch, "neighbour")[0] > 10_000, "the neighbour sends")
            beside, beside_share = phase(left, right, rate, seconds, ring, check=False)
        before, _ = carried(switch, "neighbour")
        with neighbour(sockets["neighbour"], destination, directory / "storm.log"):
            wait_until(lambda: carried(switch, "neighbour")[0] > before + 10_000, "the storm begins")
            began = time.monotonic()
            stormy, stormy_share = phase(left, right, rate, seconds, ring, check=True)
            after, drops = carried(switch, "neighbour")
        speed = (after - before) / (time.monotonic() - began)
        assert drops[reason] > 0, drops
        for what, report, share in (
            ("alone", alone, alone_share),
            ("beside an honest neighbour", beside, beside_share),
            (f"in a storm of {speed:.0f} frames a second", stormy, stormy_share),
        ):
            assert report.latency is not None
            soak.say(f"{what}: {100 * share:.1f} % of {rate} a second, p99 {report.latency.p99_us:.0f} us")
        assert stormy.corrupted == 0
        assert stormy.foreign > 0, "the storm reaches the pair"
        assert stormy.latency is not None
        assert beside.latency is not None
        soak.measured("share lost in the storm", 1 - stormy_share / beside_share, limit=1 - SHARE)
        soak.measured("times the delay", stormy.latency.p99_us / beside.latency.p99_us, limit=DELAY)
        switch.stop()
    finally:
        switch.kill()
