"""What becomes of the guests when the switch, or one of them, fails or misbehaves: Viaduct and OVS-DPDK alike.

`python -m bench.reliability` (make bench-reliability) writes bench/results/reliability.json and tables into
docs/reliability.md. Nothing is tuned: each switch runs as it comes and is started again after a crash as it was before.

- *Switch killed*: two Linux guests in QEMU, one asks the other for an answer every 2 ms. The switch gets SIGKILL and is
  started again at once. What counts is the longest time without an answer, seen from inside the guest. Where none comes
  back, one repair after the other is tried: the sockets that the crash left are removed and the switch is started once
  more; then the guests are started again.
- *Guest killed*: a generator sends between two ports while another, on two more ports, gets SIGKILL in the middle of
  its own traffic and is replaced, several times. What counts is what the first pair lost.
- *Storm*: a third port broadcasts as fast as it can while a pair sends. What counts is the share that arrives, and the
  latency, against the same without the storm.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec

from bench import hugepages, report, table, viaduct
from bench.backend import BackEnd
from bench.generator import MEMORY_MB, RING_MODES, Generator, Load, Result
from bench.hugepages import HugepageError
from bench.linux_guest import LinuxGuest, vhost_user
from bench.ovs import Ovs
from bench.process import ProgramError
from bench.programs import BuildError
from bench.report import RESULTS, Machine
from bench.roads import FAR, NEAR, PORT
from bench.suite import cpus
from bench.viaduct import AdaptiveViaduct

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
OBSERVED_S = 10.0
"""How long after the kill a guest waits for answers."""
BACK_S = 0.5
"""Traffic flows if the last answer is no older than this at the end."""
_PACED, _STORMED, _SECONDS = 50_000, 200_000, 2.0
_KILL_S = 2.5
"""So much of the pair's traffic for each kill: DPDK needs most of it to start another guest."""


class PlainViaduct(AdaptiveViaduct):
    """With the limits that ports have when nothing is said about them."""

    port_options = ""


class ConnectingViaduct(PlainViaduct):
    """Connects to sockets on which QEMU listens."""

    connects = True


class ConnectingOvs(Ovs):
    """Ports of type dpdkvhostuserclient."""

    connects = True


class FourPorts(PlainViaduct):
    ports = 4


class FourPortsOvs(Ovs):
    ports = 4


class Probe(msgspec.Struct, frozen=True):
    """What `stream probe` reports: datagrams, and seconds: the longest without an answer, and since the last one."""

    sent: int
    answered: int
    doubled: int
    longest: float
    silent: float


class Outage(msgspec.Struct, frozen=True):
    """A killed switch. `seconds` without an answer after it was started again, None if for longer than was waited;
    then `repaired_by` says what helped."""

    switch: str
    role: str
    ring: str
    seconds: float | None
    doubled: int
    repaired_by: str = ""


class Bystanders(msgspec.Struct, frozen=True):
    """A guest killed so many times, each time after its traffic had passed: what two others lost meanwhile."""

    switch: str
    kills: int
    sent: int
    lost: int
    damaged: int


class Storm(msgspec.Struct, frozen=True):
    """A broadcasting guest: the share of the pair's frames that arrive, its 99th percentile of latency in microseconds
    before and during, and its rate during the storm in terms of that before where both send all they can."""

    switch: str
    storm_rate: float
    arrived: float
    p99_before: float
    p99_during: float
    rate_kept: float


class Results(msgspec.Struct):
    """One run of everything."""

    date: str
    seconds: float
    machine: Machine
    outages: list[Outage] = []
    bystanders: list[Bystanders] = []
    storms: list[Storm] = []
    failures: list[str] = []


@contextmanager
def _running(kind: type[BackEnd]) -> Iterator[tuple[BackEnd, Path]]:
    with tempfile.TemporaryDirectory(prefix="viaduct-bench-") as name, kind(Path(name), cpus()[0]) as backend:
        backend.start()
        backend.settle()
        yield backend, Path(name)


def _guests(backend: BackEnd, directory: Path, packed: bool, stack: ExitStack) -> list[LinuxGuest]:
    """Two that reach each other; the second answers."""
    guests = []
    addresses = {NEAR: "02:00:00:00:02:01", FAR: "02:00:00:00:02:02"}
    for index, (socket, (address, mac)) in enumerate(zip(backend.sockets, addresses.items(), strict=True)):
        network = vhost_user(socket, mac, server=backend.connects, packed=packed)
        guest = stack.enter_context(LinuxGuest(f"guest{index}", directory, network, address))
        guest.start()
        guests.append(guest)
    for guest, other in zip(guests, (FAR, NEAR), strict=True):
        guest.ready()
        guest.run(f"arp -s {other} {addresses[other]}")  # no outage is made longer by address resolution
    guests[1].run(f"stream serve {PORT} >/dev/null 2>&1 &")
    guests[0].reaches(FAR)
    return guests


def _probe(guest: LinuxGuest, meanwhile: Callable[[], None], seconds: float) -> Probe:
    guest.run(f"stream probe {FAR} {PORT} {seconds} >/tmp/probe 2>&1 & echo $! >/tmp/prober")
    time.sleep(1)
    meanwhile()
    text = guest.run("while kill -0 $(cat /tmp/prober) 2>/dev/null; do sleep 0.2; done; cat /tmp/probe", seconds + 60)
    return msgspec.json.decode(text, type=Probe)


def _role(kind: type[BackEnd]) -> str:
    return "guests listen" if kind.connects else "switch listens"


def outage(kind: type[BackEnd], packed: bool) -> Outage:
    """Kill the switch between two guests and start it again."""
    ring, role = "packed" if packed else "split", _role(kind)
    with ExitStack() as stack:
        backend, directory = stack.enter_context(_running(kind))
        guests = stack.enter_context(ExitStack())
        asking, _ = _guests(backend, directory, packed, guests)

        def crash(*, clean: bool = False) -> None:
            backend.program().kill()
            if clean:
                for path in backend.sockets:
                    path.unlink(missing_ok=True)
            backend.restart()

        found = _probe(asking, crash, OBSERVED_S)
        if found.silent < BACK_S:
            return Outage(kind.name, role, ring, found.longest, found.doubled)
        if not kind.connects:
            found = _probe(asking, lambda: crash(clean=True), OBSERVED_S)
            if found.silent < BACK_S:
                return Outage(kind.name, role, ring, None, found.doubled, "removing the sockets' files by hand")
        guests.close()
        try:
            _guests(backend, directory, packed, guests)
        except ProgramError:
            return Outage(kind.name, role, ring, None, found.doubled, "nothing that was tried")
        return Outage(kind.name, role, ring, None, found.doubled, "starting the guests again")


def bystanders(kind: type[BackEnd], kills: int) -> Bystanders:
    """Kill a guest in the middle of its traffic, several times, while two others send."""
    mode, cpu = RING_MODES["split"], cpus()[1]
    with _running(kind) as (backend, _), ExitStack() as stack:
        pair = stack.enter_context(Generator(backend.sockets[:2], mode, cpu, queue_size=1024))
        pair.ready()
        pair.wait_for_traffic()
        load = Load(both=True, rate=_PACED, shared=True)
        seconds = kills * _KILL_S
        pair.begin(load, seconds)
        for _ in range(kills):
            with Generator(backend.sockets[2:], mode, cpu, site=1) as other:
                other.program.give_way()  # the pair's generator needs the CPU that they share
                other.ready()
                other.wait_for_traffic()
                other.begin(load, 30)
                time.sleep(0.7)
                other.program.kill()
        result = pair.end(seconds + 30)
    return Bystanders(kind.name, kills, result.sent, result.lost, result.corrupt)


def storm(kind: type[BackEnd]) -> Storm:
    """Let a third port broadcast while a pair sends."""
    with _running(kind) as (backend, _), ExitStack() as stack:
        generator = stack.enter_context(Generator(backend.sockets[:3], RING_MODES["split"], cpus()[1]))
        generator.ready()
        generator.wait_for_traffic()

        def run(*, rate: float, raging: bool) -> Result:
            load = Load(rate=rate, stamp=8, check=1, storm=raging) if rate else Load(storm=raging)
            generator.announce(load)
            return generator.run(load, _SECONDS)

        before, during = (run(rate=_STORMED, raging=raging) for raging in (False, True))
        most_before, most_during = (run(rate=0, raging=raging) for raging in (False, True))
    if before.latency_us is None or during.latency_us is None:
        raise ProgramError(f"{kind.name}: nothing of the pair's traffic arrived, with or without the storm")
    return Storm(
        switch=kind.name,
        storm_rate=round(during.storm / _SECONDS),
        arrived=round(during.received / during.sent, 4),
        p99_before=before.latency_us.p99,
        p99_during=during.latency_us.p99,
        rate_kept=round(most_during.received / most_before.received, 3),
    )


Finding = Outage | Bystanders | Storm


def _cases() -> Iterator[tuple[str, str, Callable[[], Finding]]]:
    """Group, name, and what to do."""
    for kind in (Ovs, ConnectingOvs, PlainViaduct, ConnectingViaduct):
        for packed in (False, True):
            name = f"{kind.name}, {_role(kind)}, {'packed' if packed else 'split'} rings: killed"
            yield "switch", name, partial(outage, kind, packed)
    for four in (FourPortsOvs, FourPorts):
        yield "guest", f"{four.name}: a guest killed", partial(bystanders, four, 3)
        yield "storm", f"{four.name}: a storm", partial(storm, four)


def run(say: Callable[[str], None], only: Sequence[str] = ()) -> Results:
    """All cases, or those of some groups; what fails is noted and the rest goes on."""
    begin = time.time()
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(begin))
    results = Results(date, 0, report.machine(viaduct.command()))
    with hugepages.reserved(Ovs.hugepages_mb + 2 * MEMORY_MB):
        for group, name, case in _cases():
            if only and group not in only:
                continue
            say(name)
            try:
                found = case()
            except ProgramError as error:
                results.failures.append(f"{name}: {error}")
                say(f"failed: {error}")
                continue
            say(f"  {found}")
            if isinstance(found, Outage):
                results.outages.append(found)
            elif isinstance(found, Bystanders):
                results.bystanders.append(found)
            else:
                results.storms.append(found)
    results.seconds = round(time.time() - begin, 1)
    return results


_TITLES = {Ovs.name: "OVS-DPDK", AdaptiveViaduct.name: "Viaduct"}


def _outage_words(found: Outage) -> str:
    if found.seconds is not None:
        return f"{found.seconds:.2f} s"
    return f"not within {OBSERVED_S - 1:.0f} s; by {found.repaired_by}"


def text(results: Results) -> str:
    """The tables, with what they mean."""
    rings = ("split", "packed")
    lines = [
        f"Measured {results.date} by `make bench-reliability` in {results.seconds / 60:.0f} minutes; Open vSwitch "
        f"{results.machine.versions.get('Open vSwitch')} with DPDK, QEMU's guests and DPDK's drivers.",
        "",
        *table.head(["switch killed and started again: traffic is back after", *(f"{ring} rings" for ring in rings)]),
    ]
    for switch, title in _TITLES.items():
        for role in dict.fromkeys(found.role for found in results.outages if found.switch == switch):
            outages = {f.ring: f for f in results.outages if (f.switch, f.role) == (switch, role)}
            lines.append(
                table.row([f"{title}, {role}", *(_outage_words(outages[r]) if r in outages else "-" for r in rings)])
            )
    lines += [
        "",
        *table.head(["a guest killed under traffic", "kills", "frames of two others", "not delivered", "damaged"]),
    ]
    for other in results.bystanders:
        cells = [_TITLES[other.switch], other.kills, f"{other.sent:,}", f"{other.lost:,}", other.damaged]
        lines.append(table.row([str(cell) for cell in cells]))
    lines += ["", *table.head(_STORM_HEADS)]
    for gale in results.storms:
        cells = [_TITLES[gale.switch], f"{gale.storm_rate / 1e6:.1f}", f"{gale.arrived:.1%}", f"{gale.p99_before:.0f}"]
        cells += [f"{gale.p99_during:.0f}", f"{gale.rate_kept:.0%}"]
        lines.append(table.row([str(cell) for cell in cells]))
    lines += [f"- FAILED: {failure.splitlines()[0]}" for failure in results.failures]
    return "\n".join(lines) + "\n"


_STORM_HEADS = [
    "a guest broadcasts all it can",
    "storm, Mpps",
    f"arrived of {_STORMED // 1000:,} kpps between two others",
    "their p99 before, us",
    "during, us",
    "their rate during, of that before, where all send all they can",
]


def _end(*_: object) -> None:
    """SIGTERM: leave as after ^C, so that switches are ended and hugepages given back."""
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], choices=("switch", "guest", "storm"), help="some of it")
    parser.add_argument("--report", action="store_true", help="measure nothing: the table from the last results")
    arguments = parser.parse_args()
    store = RESULTS / "reliability.json"
    signal.signal(signal.SIGTERM, _end)
    try:
        if arguments.report:
            results = msgspec.json.decode(store.read_bytes(), type=Results)
        else:
            results = run(lambda line: print(line, file=sys.stderr, flush=True), arguments.only)
    except KeyboardInterrupt:
        return 130
    except (ProgramError, BuildError, HugepageError, FileNotFoundError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if not arguments.only and not arguments.report:
        store.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    if not arguments.only:
        table.insert(PAGE, text(results))
    print(text(results))
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
