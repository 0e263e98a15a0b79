"""A guest with DPDK's driver, which sends with whatever address it likes, on a port with rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from interop.peer_process import wait_until
from interop.testpmd import Testpmd
from interop.viaduct_switch import ViaductSwitch

OWN, FORGED = "02:00:00:00:00:0a", "02:00:00:00:00:66"


@pytest.mark.parametrize("packed", [0, 1], ids=["split", "packed"])
def test_forged_addresses_go_nowhere(directory: Path, packed: int) -> None:
    """Nor are they learned. Without the rule, which goes while frames come, they arrive."""
    socket = directory / "guest.sock"
    switch = ViaductSwitch(directory, others=[f"guest=vhost-user:{socket},mac={OWN},spoofcheck", "hole=null"])
    device = f"net_virtio_user0,path={socket},mac={FORGED},packed_vq={packed}"
    guest = Testpmd("guest", directory, [device], "txonly")

    def port(name: str) -> Any:
        (found,) = [each for each in switch.statistics()["ports"] if each["name"] == name]
        return found

    def refused() -> int:
        return sum(queue.get("drops", {}).get("spoofed", 0) for queue in port("guest")["queues"])

    def arrived() -> int:
        return sum(queue["frames"] for queue in port("hole")["queues"] if queue["direction"] == "sent")

    try:
        switch.start()
        wait_until(socket.exists, "the port's socket")
        guest.start()
        wait_until(lambda: refused() > 10_000, "forged frames are refused")
        assert arrived() == 0
        assert FORGED not in switch.ask("macs")
        switch.ask("port", "set", "guest", "spoofcheck=")
        wait_until(lambda: arrived() > 10_000, "frames pass without the rule")
        assert FORGED in switch.ask("macs")
        switch.ask("port", "set", "guest", "rate=1M")
        waits = port("guest")["rate_waits"]
        wait_until(lambda: port("guest")["rate_waits"] > waits, "the guest is held to its rate")
        guest.stop()
        switch.stop()
    finally:
        guest.kill()
        switch.kill()
