"""Two hosts with a switch each, and a QEMU guest that moves between them while others talk with it.

A host is a network namespace. Its switch has a port for the guest and a tap interface as its uplink; a bridge joins the
uplink to one end of a cable, a pair of veth interfaces, whose other end is the other host's. On the first host's switch
there is one more tap interface, behind which the namespace itself is the guest's peer: it pings, and both send each
other a checked stream that lasts as long as it is watched.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interop.back_end import PortSpec
from interop.guest_image import TRANSFER, GuestImage
from interop.network_namespace import NetworkNamespace
from interop.peer_process import PATIENCE, PeerError, PeerProcess, require, wait_until
from interop.qemu import Guest, Nic
from interop.viaduct_switch import ViaductSwitch

PEER, GUEST = "10.0.0.1", "10.0.0.2"
MAC = "02:56:00:00:40:02"
PORT = 5001
PING_INTERVAL = 0.02
MEMORY = "160M"
BANDWIDTH, DOWNTIME_MS = 64 << 20, 50
"""Of a migration, so that it goes over the memory more than once."""
PIECE, PARKED_PORT, PARKED_PIECE = "256", 5002, "16"
"""Kibibytes every 20 ms. What nobody reads is less, because the guest's kernel has to keep it."""
MENDED_MOST = 100
"""Pages that QEMU may lose, not each time: see `mend_memory`."""
TCP_SOCKETS, LISTEN = "cat /proc/net/tcp6", "0A"
ARRIVAL = 180.0
"""Seconds that a migration, or the end of a stream, may take on a machine that does a lot else."""


@dataclass
class Host:
    """A namespace and the switch in it."""

    name: str
    namespace: NetworkNamespace
    switch: ViaductSwitch
    socket: Path


@dataclass
class Journey:
    """How the guest fared on its way to another host."""

    seconds: float
    downtime: float
    """Seconds in which it stood still, as QEMU says."""
    passes: int
    """How often QEMU went over the dirty pages."""
    transferred: int
    """Bytes."""
    mended: int
    """Pages that were not copied, see `mend_memory`."""

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s, {self.passes} passes, {self.transferred / (1 << 20):.0f} MiB, "
            f"{self.mended} pages mended, stood still for {1000 * self.downtime:.0f} ms"
        )


@dataclass
class Findings:
    """What the peer saw."""

    sent: int = 0
    answered: int = 0
    gap: float = 0.0
    """Seconds: the longest time without an answer to a ping."""
    streams: dict[str, str] = field(default_factory=dict)
    """How much arrived, by direction."""

    def __str__(self) -> str:
        streams = ", ".join(f"{name} {amount}" for name, amount in self.streams.items())
        pings = f"{self.answered} of {self.sent} pings answered, longest gap {1000 * self.gap:.0f} ms"
        return f"{pings}; {streams}, all right"


class Site:
    """Both hosts, and the guest."""

    def __init__(self, directory: Path, image: GuestImage, packed: bool, transfer: Path) -> None:
        self.directory = directory
        self.image = image
        self.packed = packed
        self.transfer = transfer
        self.hosts: list[Host] = []
        self.here = 0
        """Which host the guest is on."""
        self.moves = 0
        self.guest: Guest

    @property
    def peer(self) -> NetworkNamespace:
        """Where the guest's peer is."""
        return self.hosts[0].namespace

    def arrive(self, host: Host, incoming: Path | None = None) -> Guest:
        """A new QEMU on a host, with the same machine each time."""
        guest = Guest(
            f"guest{self.moves}",
            self.image,
            self.directory,
            (Nic(host.socket, MAC, packed=self.packed),),
            memory=MEMORY,
            incoming=incoming,
        )
        guest.start()
        return guest

    def migrate(self) -> Journey:
        """Move the guest to the other host. Raises PeerError unless it arrives."""
        source, destination = self.guest, self._set_out(BANDWIDTH)
        begin = time.monotonic()
        try:
            wait_until(lambda: self._arrived(source, destination), "the guest arrives", ARRIVAL)
            mended = mend_memory(source, destination)
            destination.monitor("cont")
            # QEMU has begun to announce the guest, and would have gone on until after this moment.
            destination.monitor("announce-self", initial=50, max=550, rounds=5, step=50)
            seconds = time.monotonic() - begin
            facts = self._progress(source)
        except BaseException:
            destination.kill()
            raise
        source.stop()
        self.guest, self.here = destination, 1 - self.here
        ram = facts["ram"]
        return Journey(seconds, facts["downtime"] / 1000, ram["dirty-sync-count"], ram["transferred"], mended)

    def turn_back(self) -> None:
        """Begin a migration, slowly, and cancel it when some of the memory has been copied."""
        destination = self._set_out(1 << 20)
        try:
            wait_until(
                lambda: self._progress(self.guest).get("ram", {}).get("transferred", 0) > 1 << 20,
                "the migration begins",
            )
            self.guest.monitor("migrate_cancel")
            wait_until(lambda: self._progress(self.guest)["status"] == "cancelled", "the migration is cancelled")
        finally:
            destination.kill()

    def _set_out(self, bandwidth: int) -> Guest:
        """Begin a migration. Returns the guest's new QEMU."""
        self.moves += 1
        way = self.directory / f"way{self.moves}"
        destination = self.arrive(self.hosts[1 - self.here], incoming=way)
        try:
            wait_until(way.exists, "the destination waits for the guest")
            destination.monitor("stop")  # when it has arrived it is to wait
            parameters = {"max-bandwidth": bandwidth, "downtime-limit": DOWNTIME_MS}
            self.guest.monitor("migrate-set-parameters", **parameters)
            self.guest.monitor("migrate", uri=f"unix:{way}")
        except BaseException:
            destination.kill()
            raise
        return destination

    @staticmethod
    def _progress(source: Guest) -> dict[str, Any]:
        facts = source.monitor("query-migrate")
        assert isinstance(facts, dict)
        return facts

    def _arrived(self, source: Guest, destination: Guest) -> bool:
        facts = self._progress(source)
        if facts.get("status") in ("failed", "cancelled"):
            raise PeerError(f"the migration: {facts}\n{source.evidence()}\n{destination.evidence()}")
        if facts.get("status") != "completed":
            return False
        state: Any = destination.monitor("query-status")
        return str(state["status"]) == "paused"

    def wait_known(self, host: Host, port: str) -> None:
        """Wait until a host's switch has learned the guest's address behind a port."""

        def known() -> bool:
            stations: Any = json.loads(host.switch.ask("macs", "--json"))
            return any((station["mac"], station["port"]) == (MAC, port) for station in stations)

        wait_until(known, f"host {host.name} finds the guest at its port {port}")

    @contextmanager
    def watched(self) -> Iterator[Findings]:
        """Pings and streams from before the `with` block until after it; they are judged at its end.

        One of the streams to the guest is not read before the end: nobody has looked at its bytes since the switch
        wrote them into the guest's memory.
        """
        findings = Findings()
        number, released = self.moves, f"/tmp/released{self.moves}"
        stop, guest_stop = self.directory / f"stop{number}", f"/tmp/stop{number}"
        transfer = str(self.transfer)
        with ExitStack() as ends:

            def start(name: str, *words: str) -> PeerProcess:
                log = self.directory / f"{name}{number}.log"
                process = PeerProcess(name, [*self.peer.enter, *words], log)
                ends.callback(process.stop)
                return process

            start("sink", transfer, "serve", str(PORT))
            wait_until(lambda: _listens(self.peer.run(TCP_SOCKETS.split()), PORT), "the peer listens")
            self.guest.run(f"transfer park {PARKED_PORT} {released} >/tmp/park.log 2>&1 </dev/null &")
            wait_until(lambda: _listens(self.guest.run(TCP_SOCKETS), PARKED_PORT), "the guest listens")
            ping = start(
                "ping", require("busybox", "busybox-static"), "ping", "-i", str(PING_INTERVAL), "-W", "10", GUEST
            )
            streams = {
                "to the guest": start("inward", transfer, "pump", GUEST, str(PORT), str(stop), PIECE),
                "read late": start("parked", transfer, "pump", GUEST, str(PARKED_PORT), str(stop), PARKED_PIECE),
            }
            pump = f"transfer pump {PEER} {PORT} {guest_stop} {PIECE}"
            self.guest.run(f"({pump}; echo status $?) >/tmp/outward.log 2>&1 </dev/null &")
            ping.wait_for_output(" seq=", count=10)
            yield findings
            ping.wait_for_output(" seq=", count=ping.output().count(" seq=") + 25)
            stop.touch()
            self.guest.run(f"touch {guest_stop} {released}")
            for name, process in streams.items():
                try:
                    process.process.wait(ARRIVAL)
                except subprocess.TimeoutExpired:
                    raise PeerError(f"the stream {name} does not end: {process.tail()}") from None
                if process.process.returncode:
                    raise PeerError(f"the stream {name}: {process.tail()}")
                findings.streams[name] = process.output().splitlines()[0]
            ended = "the end of the guest's stream"
            wait_until(lambda: "status" in self.guest.run("cat /tmp/outward.log"), ended, ARRIVAL)
            outward = self.guest.run("cat /tmp/outward.log")
            if "status 0" not in outward:
                raise PeerError(f"the stream from the guest: {outward}")
            findings.streams["from the guest"] = outward.splitlines()[0]
            ping.process.send_signal(signal.SIGINT)
            ping.wait_for_output("packets transmitted")
            judge_pings(ping.output(), findings)


def _listens(table: str, port: int) -> bool:
    """Whether the kernel's table of TCP sockets has a listening one; those of earlier connections may linger."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == LISTEN for row in rows)


def mend_memory(source: Guest, destination: Guest) -> int:
    """Give the destination, which does not run yet, the pages in which it differs from the source, which has stopped.

    Without KVM, QEMU before 9.0 loses writes of the guest's own processor while it migrates: those to a page that the
    software TLB holds as written already (fixed by its commit 03bfc2188f06). The guest would crash one time in five.
    What the switch writes cannot be told from that page by page, but by their number: QEMU loses none most of the time
    and some dozens at worst, and without the log there are hundreds.
    """
    with _memory_of(source) as old, _memory_of(destination) as new:
        lost = 0
        for chunk in range(0, len(old), 1 << 20):
            if old[chunk : chunk + (1 << 20)] == new[chunk : chunk + (1 << 20)]:
                continue
            for page in range(chunk, chunk + (1 << 20), 4096):
                if old[page : page + 4096] != new[page : page + 4096]:
                    new[page : page + 4096] = old[page : page + 4096]
                    lost += 1
        return lost


@contextmanager
def _memory_of(guest: Guest) -> Iterator[mmap.mmap]:
    """A guest's memory: the memfd that QEMU shares with the switch."""
    assert guest.process is not None
    found: list[Path] = []
    for path in Path("/proc", str(guest.process.pid), "fd").iterdir():
        with suppress(FileNotFoundError):  # one that QEMU has closed meanwhile
            if "memfd:memory-backend" in os.readlink(path):
                found.append(path)
    if not found:
        raise PeerError(f"{guest.name} has no memory that can be found")
    with found[0].open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        yield memory


def judge_pings(output: str, findings: Findings) -> None:
    """Reads what busybox's ping wrote."""
    answers = [(int(seq), float(ms)) for seq, ms in re.findall(r"seq=(\d+) ttl=\d+ time=([\d.]+) ms", output)]
    total = re.search(r"(\d+) packets transmitted, (\d+) packets received", output)
    if total is None or len(answers) < 2:
        raise PeerError(f"ping: {output[-2000:]}")
    findings.sent, findings.answered = int(total[1]), int(total[2])
    arrivals = sorted(seq * PING_INTERVAL + ms / 1000 for seq, ms in answers)
    findings.gap = max(after - before for before, after in itertools.pairwise(arrivals))


@contextmanager
def migration_site(directory: Path, image: GuestImage, packed: bool) -> Iterator[Site]:
    """Two hosts, joined, and the guest running on the first."""
    transfer = directory / "transfer"
    subprocess.run([require("gcc", "gcc libc6-dev"), "-O2", "-o", str(transfer), str(TRANSFER)], check=True)
    site = Site(directory, image, packed, transfer)
    with ExitStack() as ends:
        for name in ("a", "b"):
            namespace = ends.enter_context(NetworkNamespace())
            socket = directory / f"{name}.sock"
            taps = ["uplink=tap:uplink"] + (["peer=tap:peer"] if name == "a" else [])
            switch = ViaductSwitch(directory, [PortSpec("guest", socket)], taps, f"switch-{name}", namespace.enter)
            switch.start()
            ends.callback(switch.kill)
            site.hosts.append(Host(name, namespace, switch, socket))
        _lay_cable(*site.hosts)
        site.peer.run(["ip", "addr", "add", f"{PEER}/24", "dev", "peer"])
        site.peer.run(["ip", "link", "set", "peer", "up"])
        site.guest = site.arrive(site.hosts[0])
        ends.callback(lambda: site.guest.stop())
        site.guest.wait_ready()
        site.guest.configure(0, f"{GUEST}/24")
        site.guest.serve_transfers(PORT)
        yield site
        site.guest.stop()
        for host in site.hosts:
            host.switch.stop()


def _lay_cable(a: Host, b: Host) -> None:
    """Joins the uplinks of two hosts."""
    keeper = Path(a.namespace.enter[a.namespace.enter.index("--target") + 1])
    b.namespace.run(["ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(keeper)])
    for host in (a, b):
        busybox = require("busybox", "busybox-static")
        host.namespace.run([busybox, "brctl", "addbr", "joint"])
        for interface in ("uplink", "cable"):
            host.namespace.run([busybox, "brctl", "addif", "joint", interface])
        for interface in ("uplink", "cable", "joint"):
            # No addresses of the hosts' own: nothing is to be heard on the cable but the guests.
            host.namespace.run(["sh", "-c", f"echo 1 >/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"])
            host.namespace.run(["ip", "link", "set", interface, "up"])
    for host in (a, b):
        wait_until(
            lambda host=host: "state UP" in host.namespace.run(["ip", "link", "show", "cable"]),  # type: ignore[misc]
            f"the cable at host {host.name}",
            PATIENCE,
        )
