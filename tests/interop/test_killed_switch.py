"""The switch is killed under running guests, in the middle of their packets, and started again: the links come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from interop.back_end import PortSpec
from interop.guest_image import GuestImage
from interop.qemu import Guest, Nic
from interop.viaduct_switch import ViaductSwitch

KILLS = 4


@pytest.fixture(params=["split", "packed"])
def guests(request: pytest.FixtureRequest, directory: Path, image: GuestImage) -> Iterator[tuple[Guest, Guest]]:
    """Two guests that reconnect by themselves, not started yet."""
    left, right = (
        Guest(name, image, directory, (Nic(directory / f"{name}.sock", mac, packed=request.param == "packed"),))
        for name, mac in (("left", "02:56:00:00:00:01"), ("right", "02:56:00:00:00:02"))
    )
    yield left, right
    left.kill()
    right.kill()


def test_links_come_back(directory: Path, guests: tuple[Guest, Guest]) -> None:
    left, right = guests
    ports = [PortSpec(name, directory / f"{name}.sock", 0) for name in ("left", "right")]
    switch = ViaductSwitch(directory, ports)
    switch.start()
    try:
        left.start()
        right.start()
        for number, guest in enumerate((left, right), 1):
            guest.wait_ready()
            guest.configure(0, f"10.0.0.{number}/24")
        right.serve_transfers()
        left.ping("10.0.0.2")
        for kill in range(KILLS):
            # As fast as the answers come, in both directions, for as long as the test runs.
            left.run("ping -A -s 1000 10.0.0.2 >/dev/null 2>&1 &")
            right.run("ping -A -s 1000 10.0.0.1 >/dev/null 2>&1 &")
            left.send_transfer("10.0.0.2", 4)
            switch.kill()
            # QEMU looks for the socket once in a second; the guests' queues fill up meanwhile.
            switch = ViaductSwitch(directory, ports, name=f"viaduct-{kill}")
            switch.start()
            left.wait_ping("10.0.0.2")
            left.send_transfer("10.0.0.2", 4)
            right.run("killall ping")
            left.run("killall ping")
        switch.stop()
    finally:
        switch.kill()
