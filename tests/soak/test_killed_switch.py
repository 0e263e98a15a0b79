"""The switch is killed under traffic and started again: frames flow, no buffer is lost, no frame comes twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from interop.back_end import PortSpec
from interop.peer_process import wait_until
from interop.viaduct_switch import ViaductSwitch

from soak.conftest import Soak
from soak.steady import SteadyPair

RATE, LONG_RATE = 20_000, 200_000
QUEUE = 256
PAUSE = 0.3
RECOVERY = 1.0
"""Seconds from the start of the new switch until frames arrive."""


@pytest.mark.parametrize("tracked", [False, True], ids=["positions from the rings", "inflight record"])
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_rings_survive(directory: Path, soak: Soak, ring: str, tracked: bool) -> None:
    """Drivers that keep their rings, as those of virtual machines do: what is lost or done twice shows."""
    names = ("east0", "east1", "west0", "west1")
    ports = [PortSpec(name, directory / f"{name}.sock", link=int(name.startswith("west"))) for name in names]
    options: dict[str, Any] = {"ring": ring, "queue_size": QUEUE, "resume": True, "track_inflight": tracked}
    rate = soak.of(RATE, LONG_RATE)
    switch = ViaductSwitch(directory, ports)
    switch.start()
    recoveries = []
    lost = 0
    try:
        east = SteadyPair(ports[0].socket, ports[1].socket, rate, 0, **options)
        west = SteadyPair(ports[2].socket, ports[3].socket, rate, 1, **options)
        with east, west:
            for _ in soak.rounds(4, 50):
                time.sleep(soak.random.uniform(0, PAUSE))
                switch.kill()
                for pair in (east, west):
                    wait_until(
                        lambda: all(held == QUEUE for held in pair.held_buffers()),  # noqa: B023
                        f"all buffers of the rings are there, {QUEUE} in each",
                    )
                before = [pair.report().received for pair in (east, west)]
                switch.start()
                began = time.monotonic()
                for pair, received in zip((east, west), before, strict=True):
                    wait_until(lambda: pair.report().received > received, "frames flow again")  # noqa: B023
                recoveries.append(time.monotonic() - began)
            for pair in (east, west):
                report = pair.settle()
                lost += report.lost
                assert report.duplicated == 0
                assert report.corrupted == 0
        soak.measured("longest recovery", max(recoveries), "s", limit=RECOVERY)
        soak.measured("frames lost in all kills together", lost)
        switch.stop()
    finally:
        switch.kill()
