"""Ports come and go at random under traffic: a pair of others loses no frame, and nothing of them stays behind."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from interop.back_end import PortSpec
from interop.peer_process import PATIENCE, wait_until
from interop.viaduct_switch import ViaductSwitch

from soak.conftest import Soak
from soak.steady import SteadyPair
from viaduct.guest import Receiver
from viaduct.switch.control_client import ControlClient

RATE, LONG_RATE = 5_000, 20_000
GROWTH_MB = 8
"""What the switch may have grown by, once it has had all of its ports."""
IDLE_PORTS, IDLE_MB = 64, 100


def resident_mb(switch: ViaductSwitch) -> float:
    """Memory that the switch occupies, guests' not counted: what is shared with them is theirs."""
    lines = Path(f"/proc/{switch.running_process().pid}/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return (sizes["RssAnon"] + sizes["RssFile"]) / 1024


class Churn:
    """Adds and removes ports over one control connection, and has a guest on some of them now and then."""

    def __init__(self, control: ControlClient, directory: Path, soak: Soak, most: int) -> None:
        self.control = control
        self.directory = directory
        self.random = soak.random
        self.most = most
        self.ports: dict[str, Path | None] = {}
        self.visits = 0
        self._runner = asyncio.Runner()
        self._guests: dict[str, Receiver] = {}

    def add(self) -> None:
        """One port more, of either kind, in a network with some of the others."""
        name = next(name for name in (f"c{number}" for number in range(self.most)) if name not in self.ports)
        path = None if self.random.random() < 0.2 else self.directory / f"{name}.sock"
        port = {"kind": "vhost-user", "path": str(path)} if path else {"kind": "null"}
        rules = self.random.choice(
            ({}, {"rate": "1M"}, {"storm": 5, "macs": 3}, {"mac": f"02:cc:00:00:00:{len(name):02x}"})
        )
        vlan = 1000 + int(name[1:])
        self.control.call("port.add", name=name, port={**port, **rules, "vlan": vlan})
        self.ports[name] = path

    def remove(self, name: str) -> None:
        """One port less; a guest that is there finds the end of its connection."""
        self.control.call("port.del", name=name)
        del self.ports[name]
        if guest := self._guests.pop(name, None):
            self._runner.run(guest.close())

    def visit(self) -> None:
        """A guest comes to one of the ports."""
        free = [(name, path) for name, path in self.ports.items() if path and name not in self._guests]
        if not free or len(self._guests) >= 4:
            return
        name, path = self.random.choice(free)
        guest = Receiver(path, connect_timeout=PATIENCE)
        self._runner.run(guest.start())
        self._guests[name] = guest
        self.visits += 1

    def step(self) -> None:
        """Something happens."""
        if self.random.random() < 0.05:
            self.visit()
        elif (len(self.ports) < self.most and self.random.random() < 0.5) or not self.ports:
            self.add()
        else:
            self.remove(self.random.choice(list(self.ports)))

    def fill(self) -> None:
        """All the ports there may be."""
        while len(self.ports) < self.most:
            self.add()

    def clear(self) -> None:
        """None of them."""
        for name in list(self.ports):
            self.remove(name)

    def close(self) -> None:
        """End the guests."""
        for guest in self._guests.values():
            self._runner.run(guest.close())
        self._runner.close()


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_ports_come_and_go(directory: Path, soak: Soak, ring: str) -> None:
    switch = ViaductSwitch(directory, [PortSpec(name, directory / f"{name}.sock") for name in ("left", "right")])
    switch.start()
    most, seconds = soak.of(24, 512), soak.of(6, 600)
    try:
        left, right = directory / "left.sock", directory / "right.sock"
        with (
            SteadyPair(left, right, soak.of(RATE, LONG_RATE), ring=ring) as pair,
            ControlClient(str(switch.control)) as control,
        ):
            churn = Churn(control, directory, soak, most)
            try:
                # Once through everything, so that what is kept for ever is there.
                churn.fill()
                churn.visit()
                churn.clear()
                before, memory = switch.resources(), resident_mb(switch)
                ended, steps, slowest = time.monotonic() + seconds, 0, 0.0
                while time.monotonic() < ended:
                    began = time.monotonic()
                    churn.step()
                    slowest, steps = max(slowest, time.monotonic() - began), steps + 1
                churn.clear()
                wait_until(lambda: switch.resources() == before, f"nothing is left of the ports, again {before}")
                soak.measured("memory grown", resident_mb(switch) - memory, "MB", limit=GROWTH_MB)
            finally:
                churn.close()
            report = pair.check()
        soak.say(f"{steps} changes among {most} ports, {churn.visits} guests; the slowest took {1000 * slowest:.1f} ms")
        soak.measured("frames of the others, none lost", report.received)
        switch.stop()
    finally:
        switch.kill()


def test_idle_ports_are_small(directory: Path, soak: Soak) -> None:
    """The memory of a switch with many ports, Python included."""
    ports = [PortSpec(f"p{number}", directory / f"p{number}.sock") for number in range(IDLE_PORTS)]
    switch = ViaductSwitch(directory, ports)
    switch.start()
    try:
        used = resident_mb(switch)
        soak.measured(f"memory with {IDLE_PORTS} idle ports", used, "MB", limit=IDLE_MB)
        # No matter of time or load, so it holds in either form.
        assert used <= IDLE_MB
        switch.stop()
    finally:
        switch.kill()
