"""A new process takes over a running switch: QEMU guests, an interface, and the command of the user."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from interop.back_end import PortSpec
from interop.guest_image import GuestImage
from interop.network_namespace import NetworkNamespace
from interop.peer_process import PeerProcess, wait_until
from interop.qemu import Guest, Nic
from interop.viaduct_switch import ViaductSwitch
from viaduct.switch.control_client import ControlClient

UPGRADES = 3


@pytest.fixture(params=["split", "packed"])
def guests(request: pytest.FixtureRequest, directory: Path, image: GuestImage) -> Iterator[tuple[Guest, Guest]]:
    """Two guests, not started yet: QEMU connects to the switch on one side, and listens on the other."""
    left, right = (
        Guest(name, image, directory, (Nic(directory / f"{name}.sock", mac, server, packed=request.param == "packed"),))
        for name, mac, server in (("left", "02:56:00:00:40:01", False), ("right", "02:56:00:00:40:02", True))
    )
    yield left, right
    left.kill()
    right.kill()


def test_guests_notice_nothing(directory: Path, guests: tuple[Guest, Guest]) -> None:
    """A stream, pings and the carrier of the cards live through it."""
    left, right = guests
    ports = [PortSpec("left", directory / "left.sock"), PortSpec("right", directory / "right.sock", client=True)]
    switch = ViaductSwitch(directory, ports)
    switch.start()
    try:
        for guest in guests:
            guest.start()
        for number, guest in enumerate(guests, 1):
            guest.wait_ready()
            guest.configure(0, f"10.0.0.{number}/24")
        right.serve_transfers()
        left.ping("10.0.0.2")
        carriers = [guest.run("cat /sys/class/net/eth0/carrier_changes") for guest in guests]
        before = switch.statistics()
        for _ in range(UPGRADES):
            left.run("(transfer send 10.0.0.2 5001 48 2 >/tmp/sent 2>&1; echo $? >/tmp/status) &")
            left.run("ping -A -w 60 10.0.0.2 >/dev/null 2>&1 &")
            switch.upgrade()
            wait_until(lambda: left.run("cat /tmp/status 2>/dev/null; true").strip(), "the transfer's end", 120)
            assert left.run("cat /tmp/status; rm /tmp/status").strip() == "0", left.run("cat /tmp/sent")
            left.run("killall ping")
        assert [guest.run("cat /sys/class/net/eth0/carrier_changes") for guest in guests] == carriers
        after = switch.statistics()
        for old, new in zip(before["ports"], after["ports"], strict=True):
            for was, now in zip(old["queues"], new["queues"], strict=True):
                assert now["frames"] > was["frames"], "the counters go on"
        switch.stop()
    finally:
        switch.kill()


def status(switch: ViaductSwitch, name: str) -> Any:
    """One port as `viaduct port list --json` shows it."""
    return next(port for port in json.loads(switch.ask("port", "list", "--json")) if port["name"] == name)


def number(namespace: NetworkNamespace, interface: str) -> str:
    """What the kernel numbered an interface as."""
    return namespace.run(["ip", "-o", "link", "show", interface]).split(":")[0]


def test_interface_is_taken_over_and_comes_back(directory: Path) -> None:
    with NetworkNamespace() as namespace:
        namespace.run(["ip", "tuntap", "add", "viafound", "mode", "tap", "vnet_hdr"])
        switch = ViaductSwitch(
            directory, others=["made=tap:viamade,queues=2", "found=tap:viafound"], launcher=namespace.enter
        )
        try:
            switch.start()
            index = number(namespace, "viamade")
            switch.upgrade()
            assert number(namespace, "viamade") == index, "it is the same interface"
            assert status(switch, "made")["link"] == "up"
            # What the switch made it makes again; what it found it waits for, and says so.
            namespace.run(["ip", "link", "delete", "viamade"])
            namespace.run(["ip", "link", "delete", "viafound"])
            wait_until(lambda: status(switch, "found")["link"] == "broken", "the switch sees that viafound is gone")
            found = status(switch, "found")
            assert found["retry_in"] is not None
            assert re.search(r"was it deleted\?; next try in [\d.]+ s", found["detail"])
            wait_until(lambda: status(switch, "made")["link"] == "up", "viamade is made again")
            assert number(namespace, "viamade") != index
            namespace.run(["ip", "tuntap", "add", "viafound", "mode", "tap", "vnet_hdr"])
            wait_until(lambda: status(switch, "found")["link"] == "up", "viafound is opened again")
            switch.stop()
        finally:
            switch.kill()


def test_command(directory: Path) -> None:
    """`viaduct upgrade` starts the new process and goes away."""
    switch = ViaductSwitch(directory, [PortSpec("one", directory / "one.sock")], ["two=null"])
    switch.start()
    new = 0
    try:
        old = switch.running_process()
        said = switch.ask("upgrade")
        found = re.fullmatch(rf"pid (\d+) has taken over from pid {old.pid}; gap [\d.]+ ms\n", said)
        assert found, said
        new = int(found[1])
        old.wait_for(lambda: not old.running(), "its end")
        assert old.process.returncode == 0
        with ControlClient(switch.control) as control:
            assert control.call("about")["pid"] == new
            assert {port["name"] for port in control.call("port.list")} == {"one", "two"}
            control.call("shutdown")
        wait_until(lambda: not os.path.exists(f"/proc/{new}"), "the new process ends")
        assert not (directory / "one.sock").exists()
        assert " handed-over: " in old.output()
        assert " upgraded: " in old.output(), "the new process writes where the old one did"
    finally:
        switch.kill()
        if new and os.path.exists(f"/proc/{new}"):
            os.kill(new, 9)


def test_configuration_is_read_again(directory: Path) -> None:
    """A mistake in it leaves the old process where it was; a change is in force with the new one."""
    file, control = directory / "net.toml", directory / "control.sock"
    program = ViaductSwitch(directory).program
    file.write_text('polling = "busy"\n[ports.one]\nkind = "null"\n')
    command = [program, "switch", "--config", "net.toml", "--control", str(control)]
    old = PeerProcess("old", ["env", "-C", str(directory), *command], directory / "old.log")
    new = None
    try:
        old.wait_for_output(" ready: ")
        file.write_text('[ports.one]\nkind = "nil"\n')
        refused = subprocess.run([program, "upgrade", "--control", str(control)], capture_output=True, text=True)
        assert refused.returncode == 2
        assert "net.toml" in refused.stderr
        assert "unknown kind of port 'nil'" in refused.stderr
        old.wait_for_output(" upgrade-failed: this process goes on: ")
        file.write_text('polling = "interrupt"\n[ports.one]\nkind = "null"\n[ports.two]\nkind = "null"\n')
        new = PeerProcess("new", [program, "upgrade", "--foreground", "--control", str(control)], directory / "new.log")
        new.wait_for_output(" ready: ")
        old.wait_for(lambda: not old.running(), "its end")
        with ControlClient(control) as client:
            config = client.call("config")
        assert sorted(config["ports"]) == ["one", "two"]
        assert config["polling"] == "interrupt"
    finally:
        old.kill()
        if new is not None:
            new.kill()
