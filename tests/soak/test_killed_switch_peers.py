"""The same with drivers that nobody here wrote: Linux in QEMU, and DPDK's virtio-user, which listens for the switch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interop.back_end import PortSpec
from interop.guest_image import GuestImage
from interop.peer_process import wait_until
from interop.qemu import Guest, Nic
from interop.testpmd import Testpmd
from interop.viaduct_switch import ViaductSwitch

from soak.conftest import Soak
from soak.steady import SteadyPair

RATE = 5_000
PAUSE = 0.5
RECOVERY = 1.0
"""Seconds from the start of the new switch until frames pass. Guests that connect look one second after they lost the
switch (QEMU before 9.2 cannot do so earlier), so for them it is from the moment at which the new switch is ready."""
MACS = "02:56:00:00:00:01", "02:56:00:00:00:02"
STATION, RECEIVER = "02:56:00:00:50:01", "02:76:64:01:00:01"


def recovery(switch: ViaductSwitch, flows: Callable[[], bool]) -> float:
    """Starts the switch. Returns how long it took from then on until frames passed."""
    switch.start()
    began = time.monotonic()
    wait_until(flows, "frames flow again")
    return time.monotonic() - began


@pytest.mark.parametrize("listener", ["switch", "guest"])
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_qemu_guests(directory: Path, image: GuestImage, soak: Soak, ring: str, listener: str) -> None:
    """As many pings as answers come, each way, at every kill; streams with checksums after each."""
    guest_listens = listener == "guest"
    left, right = guests = [
        Guest(name, image, directory, (Nic(directory / f"{name}.sock", mac, guest_listens, packed=ring == "packed"),))
        for name, mac in zip(("left", "right"), MACS, strict=True)
    ]
    ports = [PortSpec(name, directory / f"{name}.sock", client=guest_listens) for name in ("left", "right")]
    switch = ViaductSwitch(directory, ports)
    switch.start()
    recoveries = []
    try:
        for guest in guests:
            guest.start()
        for number, guest in enumerate(guests, 1):
            guest.wait_ready()
            guest.configure(0, f"10.0.0.{number}/24")
            guest.serve_transfers()
        left.wait_ping("10.0.0.2")
        # Otherwise the link's going down makes them forget each other, and they ask once a second (ARP).
        left.run(f"arp -s 10.0.0.2 {MACS[1]}")
        right.run(f"arp -s 10.0.0.1 {MACS[0]}")
        for _ in soak.rounds(1, 35):
            left.run("ping -A -s 1000 10.0.0.2 >/dev/null 2>&1 &")
            right.run("ping -A -s 1000 10.0.0.1 >/dev/null 2>&1 &")
            time.sleep(soak.random.uniform(0, PAUSE))
            switch.kill()
            switch.start()
            if not guest_listens:
                switch.wait_ready()
            began = time.monotonic()
            left.wait_reached("10.0.0.2")
            recoveries.append(time.monotonic() - began)
            for guest in guests:
                guest.run("killall ping")
            left.send_transfer("10.0.0.2", 4)
            right.send_transfer("10.0.0.1", 4)
        soak.measured("longest recovery", max(recoveries), "s", limit=RECOVERY)
        soak.measured("half of them took at most", statistics.median(recoveries), "s")
        switch.stop()
    finally:
        for guest in guests:
            guest.kill()
        switch.kill()


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_testpmd(directory: Path, soak: Soak, ring: str) -> None:
    """testpmd gives each frame a new receiver and sends it back: every one passes the switch twice."""
    station_socket, sender, receiver = (directory / f"{name}.sock" for name in ("station", "from", "to"))
    # Private: the receiver does not hear the sender's frames while testpmd's address is not known.
    private = [f"{socket.stem}=vhost-user:{socket},private" for socket in (sender, receiver)]
    device = f"net_virtio_user0,path={station_socket},mac={STATION},queue_size=256,server=1"
    options = ["--no-flush-rx", f"--eth-peer=0,{RECEIVER}", "--port-topology=loop", "--rxd=256", "--txd=256"]
    station = Testpmd("station", directory, [f"{device},packed_vq={int(ring == 'packed')}"], "mac", (), options)
    switch = ViaductSwitch(directory, [PortSpec("station", station_socket, client=True)], private)
    switch.start()
    recoveries = []
    try:
        station.start()
        pair = SteadyPair(sender, receiver, RATE, ring=ring, queue_size=256, resume=True, to=STATION)
        with pair:
            for _ in soak.rounds(2, 30):
                time.sleep(soak.random.uniform(0, PAUSE))
                switch.kill()
                before = pair.report().received
                recoveries.append(recovery(switch, lambda: pair.report().received > before))  # noqa: B023
            report = pair.settle()
        assert report.duplicated == 0
        assert report.corrupted == 0
        soak.measured("longest recovery", max(recoveries), "s", limit=RECOVERY)
        soak.measured("frames that arrived", report.received)
        station.stop()
        switch.stop()
    finally:
        station.kill()
        switch.kill()
