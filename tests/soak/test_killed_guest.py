"""A guest is killed under traffic, over and over: the others lose no frame, and the switch keeps nothing of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from interop.back_end import PortSpec
from interop.guest_image import GuestImage
from interop.peer_process import PeerProcess, require, wait_until
from interop.qemu import Guest, Nic
from interop.viaduct_switch import ViaductSwitch

from soak.conftest import Soak
from soak.steady import SteadyPair

RATE, LONG_RATE = 5_000, 100_000
PAUSE = 0.3
"""Seconds at most between a guest's first frame and its end."""


def start_guest(command: str, socket: Path, ring: str, directory: Path) -> PeerProcess:
    """`viaduct send` as fast as it can, or `viaduct receive` as its receiver."""
    program = require(str(Path(sys.executable).parent / "viaduct"), "make, then run the tests in its .venv")
    log = directory / f"{socket.stem}.log"
    return PeerProcess(
        command, [program, command, "--connect", str(socket), "--ring", ring, "--seconds", "1000000"], log
    )


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_others_do_not_notice(directory: Path, soak: Soak, ring: str) -> None:
    """Of two guests, one of which sends to the other at full speed, one at a time is killed and started again."""
    names = ("steady0", "steady1", "send", "receive")
    sockets = {name: directory / f"{name}.sock" for name in names}
    # In a VLAN of their own: a frame for a receiver that is dead is flooded, and would be counted by the steady one.
    ports = [PortSpec(name, sockets[name], link=int(name in ("send", "receive"))) for name in names]
    switch = ViaductSwitch(directory, ports)
    switch.start()
    guests: dict[str, PeerProcess] = {}

    def links(*wanted: str) -> bool:
        up = {port["name"] for port in switch.statistics()["ports"] if port["link"] == "up"}
        return up == {"steady0", "steady1", *wanted}

    def start(command: str) -> None:
        guests[command] = start_guest(command, sockets[command], ring, directory)

    try:
        with SteadyPair(sockets["steady0"], sockets["steady1"], soak.of(RATE, LONG_RATE)) as pair:
            wait_until(links, "the steady pair is connected")
            before = switch.resources()
            for command in ("receive", "send"):
                start(command)
            for _ in soak.rounds(8, 200):
                wait_until(lambda: links("send", "receive"), "both guests are connected")
                time.sleep(soak.random.uniform(0, PAUSE))
                victim = soak.random.choice(("send", "receive"))
                guests[victim].kill()
                start(victim)
            for guest in guests.values():
                guest.kill()
            wait_until(links, "the killed guests' ports are down")
            report = pair.check()
            wait_until(lambda: switch.resources() == before, f"nothing is left of the killed guests, again {before}")
        soak.measured("frames of the others, none lost", report.received)
        assert report.latency is not None
        soak.measured("their longest way", report.latency.max_us / 1000, "ms")
        switch.stop()
    finally:
        for guest in guests.values():
            guest.kill()
        switch.kill()


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_others_do_not_notice_qemu(directory: Path, image: GuestImage, soak: Soak, ring: str) -> None:
    """The same with Linux in QEMU: two guests ping each other as fast as answers come, and one at a time is killed."""
    names = ("steady0", "steady1", "left", "right")
    sockets = {name: directory / f"{name}.sock" for name in names}
    ports = [PortSpec(name, sockets[name], link=int(name in ("left", "right"))) for name in names]
    macs = {"left": "02:56:00:00:00:01", "right": "02:56:00:00:00:02"}
    addresses = {"left": "10.0.0.1", "right": "10.0.0.2"}
    guests: dict[str, Guest] = {}
    switch = ViaductSwitch(directory, ports)
    switch.start()

    def up() -> set[str]:
        return {port["name"] for port in switch.statistics()["ports"] if port["link"] == "up"}

    def start(name: str) -> None:
        guests[name] = Guest(name, image, directory, (Nic(sockets[name], macs[name], packed=ring == "packed"),))
        guests[name].start()

    def set_up(name: str) -> None:
        guests[name].wait_ready()
        guests[name].configure(0, f"{addresses[name]}/24")

    try:
        with SteadyPair(sockets["steady0"], sockets["steady1"], soak.of(RATE, LONG_RATE)) as pair:
            wait_until(lambda: up() == {"steady0", "steady1"}, "the steady pair is connected")
            before = switch.resources()
            for name in macs:
                start(name)
            for name in macs:
                set_up(name)
            for _ in soak.rounds(1, 50):
                guests["left"].wait_ping(addresses["right"])
                for name, other in (("left", "right"), ("right", "left")):
                    guests[name].run(f"ping -A -s 1000 {addresses[other]} >/dev/null 2>&1 &")
                time.sleep(soak.random.uniform(0, PAUSE))
                victim = soak.random.choice(("left", "right"))
                guests[victim].kill()
                guests["left" if victim == "right" else "right"].run("killall ping")
                start(victim)
                set_up(victim)
            guests["left"].wait_ping(addresses["right"])
            for guest in guests.values():
                guest.kill()
            wait_until(lambda: up() == {"steady0", "steady1"}, "the killed guests' ports are down")
            report = pair.check()
            wait_until(lambda: switch.resources() == before, f"nothing is left of the killed guests, again {before}")
        soak.measured("frames of the others, none lost", report.received)
        switch.stop()
    finally:
        for guest in guests.values():
            guest.kill()
        switch.kill()
