"""The generator as the runner sees it: ring modes, loads, and the answers it gives. The program is generator.c."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import msgspec

from bench import programs
from bench.process import Program, ProgramError

MEMORY_MB = 96
PORTS_MAX = 32
"""So many ports one DPDK process of Debian's can have."""
QUEUE_SIZE = 256


class RingMode(msgspec.Struct, frozen=True):
    """How the driver lays out its rings: options of DPDK's virtio-user device."""

    name: str
    title: str
    options: str = ""


RING_MODES = {
    mode.name: mode
    for mode in (
        RingMode("split", "split"),
        RingMode("split-nomrg", "split, mergeable off", "mrg_rxbuf=0"),
        RingMode("packed", "packed", "packed_vq=1"),
        RingMode("packed-nomrg", "packed, mergeable off", "packed_vq=1,mrg_rxbuf=0"),
    )
}


class Load(msgspec.Struct, frozen=True):
    """What is sent. Rates are packets a second for each direction, 0 for as fast as possible; `stamp` and `check`
    give the share (one in so many) of frames that carry a sequence number, and that the receiver verifies;
    `until_first` ends the run with the first frame that comes through; with `storm` a third port broadcasts;
    with `shared` what others send on the same switch is put aside."""

    size: int = 64
    both: bool = False
    rate: float = 0
    burst: int = 32
    sources: int = 1
    destinations: int = 1
    stamp: int = 64
    check: int = 64
    until_first: bool = False
    storm: bool = False
    shared: bool = False

    def words(self) -> str:
        return " ".join(f"{key}={float(value):.12g}" for key, value in msgspec.to_builtins(self).items())


class Sample(msgspec.Struct, frozen=True):
    """Totals since the start of a run; `gap_us` is the longest time the generator did not look at its rings."""

    time: float
    sent: int
    received: int
    gap_us: float


class Latency(msgspec.Struct, frozen=True):
    """Microseconds from handing a frame to the sending ring to finding it in the receiving one."""

    count: int
    min: float
    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float
    histogram: list[tuple[float, int]]


class Result(msgspec.Struct, frozen=True):
    """One run. `lost` had not arrived when the rings had been silent for 10 ms; times are of the epoch."""

    start: float
    end: float
    size: int
    first: float
    offered: int
    sent: int
    received: int
    lost: int
    stamped: int
    checked: int
    corrupt: int
    disordered: int
    loops: int
    empty_loops: int
    storm: int
    samples: list[Sample]
    latency_us: Latency | None

    def rates(self) -> list[float]:
        """Packets received a second in each interval."""
        start = Sample(self.start, 0, 0, 0)
        points = [start, *self.samples]
        return [(b.received - a.received) / (b.time - a.time) for a, b in pairwise(points)]


class _Event(msgspec.Struct, frozen=True):
    event: str
    time: float = 0
    tsc_hz: int = 0


class Generator:
    """One generator process with its two (or more) virtio-user ports on the given sockets.

    Generators on the same switch need different sites, or their stations have the same addresses.
    """

    def __init__(
        self,
        sockets: Sequence[Path],
        mode: RingMode,
        cpu: int,
        *,
        hugepages: bool = True,
        queue_size: int = QUEUE_SIZE,
        site: int = 0,
    ) -> None:
        memory = ["--single-file-segments", "--in-memory"] if hugepages else ["--no-huge"]
        # fmt: off
        command = [
            str(programs.generator()), "--lcores", f"0@{cpu}", "--no-pci", "--no-telemetry", *memory,
            "-m", str(MEMORY_MB), "--log-level=lib.eal:error", "--",
        ]
        # fmt: on
        for index, socket in enumerate(sockets):
            options = f",{mode.options}" if mode.options else ""
            mac = f"02:00:00:00:01:{index:02x}"
            command += ["--port", f"path={socket},queues=1,queue_size={queue_size},mac={mac}{options}"]
        command += ["--site", str(site)]
        self.program = Program("generator", command)
        self.tsc_hz = self._event("started").tsc_hz

    def _event(self, name: str, timeout: float = 40) -> _Event:
        return msgspec.json.decode(self._answer(name, timeout), type=_Event)

    def _answer(self, name: str, timeout: float) -> str:
        return self.program.wait_for(f'{{"event":"{name}"', timeout)

    def ready(self) -> float:
        """Wait until the ports are connected; returns the time of the epoch."""
        return self._event("ready").time

    def wait_for_traffic(self, timeout: float = 10) -> float:
        """Send slowly until a frame comes through; returns its time of the epoch. Raises ProgramError if none does."""
        first = self.run(Load(both=True, rate=100_000, until_first=True), timeout).first
        if not first:
            raise ProgramError(f"no frame came through within {timeout:g} s")
        return first

    def announce(self, load: Load) -> None:
        """Make all stations of a load known to a switch that learns."""
        self.program.say(f"announce {load.words()}")
        self._answer("announced", 60)

    def begin(self, load: Load, seconds: float, interval: float = 0.05) -> None:
        """Start a run without waiting for its end; `end` takes its result."""
        self.program.say(f"run seconds={seconds} interval={interval} {load.words()}")

    def end(self, seconds: float) -> Result:
        return msgspec.json.decode(self._answer("result", seconds + 10), type=Result)

    def run(self, load: Load, seconds: float, interval: float = 0.05) -> Result:
        self.begin(load, seconds, interval)
        return self.end(seconds)

    def stop(self) -> None:
        self.program.stop("quit")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
