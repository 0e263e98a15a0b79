"""What the tests need of a back-end under test, so that the same tests can run against ours and against DPDK's.

A back-end joins vhost-user ports in links: the ports of one link are one Ethernet segment, different links know
nothing of each other. `ViaductSwitch` makes a link a VLAN with access ports; testpmd joins two ports by its io
forwarding. Running the tests against testpmd (VIADUCT_INTEROP_BACK_END=testpmd) tells whether a failure is the
switch's or the test's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class PortSpec:
    """One vhost-user port: the back-end listens on `socket`, or connects to it with `client`."""

    name: str
    socket: Path
    link: int = 0
    client: bool = False
    queue_pairs: int = 1
    mtu: int | None = None


class BackEnd(Protocol):
    """A back-end as a process."""

    def start(self) -> None:
        """Start it; return when its listening sockets exist."""

    def stop(self) -> None:
        """End it in order; raises PeerError when it leaves something behind."""

    def kill(self) -> None:
        """End it with SIGKILL, if it runs."""
