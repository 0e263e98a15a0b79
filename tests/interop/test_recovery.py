"""Links that were lost come back: guests killed, reset, rebooted, their driver taken and given; the switch restarted.

Two guests with two links, one with split and one with packed rings. On one side QEMU connects to the switch, on the
other the switch connects to QEMU. Every test leaves both links working, which is what the next one begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop.back_end import BackEnd, PortSpec
from interop.guest_image import GuestImage
from interop.peer_process import wait_until
from interop.qemu import Guest, Nic
from interop.viaduct_switch import ViaductSwitch

LAYOUTS = ("split", "packed")


@dataclass
class Site:
    """What the tests of this module share."""

    connecting: Guest
    listening: Guest
    back_end: BackEnd

    @property
    def guests(self) -> tuple[Guest, Guest]:
        return self.connecting, self.listening

    def configure(self, guest: Guest) -> None:
        host = self.guests.index(guest) + 1
        for link in range(len(LAYOUTS)):
            guest.configure(link, f"10.0.{link}.{host}/24")
        guest.serve_transfers()

    def check(self, link: int) -> None:
        """Frames pass in both directions, all of them right."""
        self.connecting.wait_ping(f"10.0.{link}.2")
        self.listening.wait_ping(f"10.0.{link}.1")
        self.connecting.send_transfer(f"10.0.{link}.2", 8)
        self.listening.send_transfer(f"10.0.{link}.1", 8)

    def check_all(self) -> None:
        for link in range(len(LAYOUTS)):
            self.check(link)


@pytest.fixture(scope="module")
def site(
    module_directory: Path, image: GuestImage, make_back_end: Callable[[Path, Sequence[PortSpec]], BackEnd]
) -> Iterator[Site]:
    ports: list[PortSpec] = []
    nics: tuple[list[Nic], list[Nic]] = ([], [])
    for link, layout in enumerate(LAYOUTS):
        for side, listens in enumerate((False, True)):
            socket = module_directory / f"{layout}{side}.sock"
            mac = f"02:56:00:00:1{link}:0{side + 1}"
            nics[side].append(Nic(socket, mac, server=listens, packed=layout == "packed"))
            ports.append(PortSpec(f"{layout}{side}", socket, link, client=listens))
    back_end = make_back_end(module_directory, ports)
    connecting = Guest("connecting", image, module_directory, tuple(nics[0]))
    listening = Guest("listening", image, module_directory, tuple(nics[1]))
    both = Site(connecting, listening, back_end)
    try:
        back_end.start()
        for guest in both.guests:
            guest.start()
        for guest in both.guests:
            guest.wait_ready()
            both.configure(guest)
        both.check_all()
        yield both
        for guest in both.guests:
            guest.stop()
        back_end.stop()
    finally:
        for guest in both.guests:
            guest.kill()
        back_end.kill()


def by_side(site: Site, side: str) -> Guest:
    return site.connecting if side == "connecting" else site.listening


sides = pytest.mark.parametrize("side", ["connecting", "listening"])


@sides
def test_killed_guest_comes_back(site: Site, side: str) -> None:
    guest, other = by_side(site, side), site.guests[side == "connecting"]
    host = site.guests.index(guest) + 1
    other.run(f"ping -A -q 10.0.0.{host} >/dev/null 2>&1 & ping -A -q 10.0.1.{host} >/dev/null 2>&1 &")
    guest.kill()
    guest.start()
    guest.wait_ready()
    other.run("killall ping")
    site.configure(guest)
    site.check_all()


@sides
def test_reset_guest_comes_back(site: Site, side: str) -> None:
    guest, other = by_side(site, side), site.guests[side == "connecting"]
    host = site.guests.index(guest) + 1
    other.run(f"ping -A -q 10.0.0.{host} >/dev/null 2>&1 & ping -A -q 10.0.1.{host} >/dev/null 2>&1 &")
    guest.reset()
    other.run("killall ping")
    site.configure(guest)
    site.check_all()


def test_rebooted_guest_comes_back(site: Site) -> None:
    site.connecting.reboot()
    site.configure(site.connecting)
    site.check_all()


@pytest.mark.parametrize("link", range(len(LAYOUTS)), ids=LAYOUTS)
@sides
def test_driver_unbound_and_bound(site: Site, side: str, link: int) -> None:
    guest, other = by_side(site, side), site.guests[side == "connecting"]
    host = site.guests.index(guest) + 1
    other.run(f"ping -A -q 10.0.{link}.{host} >/dev/null 2>&1 &")
    for _ in range(3):
        guest.bind_driver(guest.unbind_driver(link))
    other.run("killall ping")
    guest.configure(link, f"10.0.{link}.{host}/24")
    site.check_all()


def test_comings_and_goings_leak_nothing(site: Site, viaduct_only: None) -> None:
    assert isinstance(site.back_end, ViaductSwitch)
    site.check_all()
    before = site.back_end.resources()
    for guest in site.guests:
        for link in range(len(LAYOUTS)):
            guest.bind_driver(guest.unbind_driver(link))
        guest.reset()
        site.configure(guest)
    site.connecting.kill()
    site.connecting.start()
    site.connecting.wait_ready()
    site.configure(site.connecting)
    site.check_all()
    assert site.back_end.resources() == before


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_restarted_switch_gets_its_guests_back(site: Site, end: str) -> None:
    site.connecting.run("ping -A -q 10.0.0.2 >/dev/null 2>&1 & ping -A -q 10.0.1.2 >/dev/null 2>&1 &")
    if end == "stopped":
        site.back_end.stop()
    else:
        site.back_end.kill()
    for guest in site.guests:
        for link in range(len(LAYOUTS)):
            carrier = f"cat /sys/class/net/eth{link}/carrier"
            wait_until(lambda: guest.run(carrier).strip() == "0", f"{guest.name} sees that link {link} is down")  # noqa: B023
    site.back_end.start()
    site.connecting.run("killall ping")
    site.check_all()
