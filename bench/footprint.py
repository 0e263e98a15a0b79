"""What a back-end costs besides cycles: memory, CPU while idle and nearly idle, time to the first forwarded packet."""

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench.backend import BackEnd
from bench.generator import PORTS_MAX, RING_MODES, Generator, Load
from bench.process import ProgramError

_MODE = RING_MODES["split"]


class Footprint(msgspec.Struct, frozen=True):
    """One back-end with two connected ports. Memory in bytes; CPU as a share of one core; times in seconds.

    `own_small`/`own_huge`: resident memory of the forwarding process without the guests' memory.
    """

    own_small: int
    own_huge: int
    cpu_idle: float
    cpu_10k: float
    first_packet: list[float]
    first_packet_median: float


def _cpu_share(backend: BackEnd, seconds: float) -> float:
    """The share of one core that all its threads used together while we sleep."""
    before = sum(thread.running for thread in backend.program().threads().values())
    start = time.monotonic()
    time.sleep(seconds)
    after = sum(thread.running for thread in backend.program().threads().values())
    return (after - before) / (time.monotonic() - start)


def _first_packet(kind: type[BackEnd], cpu: int, generator_cpu: int) -> float:
    """Seconds from the start of the process to the first frame that came through.

    The generator is up before and tries its sockets every half millisecond; attaching to them is part of the time.
    """
    with tempfile.TemporaryDirectory(prefix="viaduct-bench-") as directory:
        backend = kind(Path(directory), cpu)
        with Generator(backend.sockets, _MODE, generator_cpu) as generator, backend:
            generator.begin(Load(both=True, rate=100_000, until_first=True), seconds=20)
            backend.start()
            first = generator.end(60).first
    if first == 0:
        raise ProgramError(f"{kind.name} forwarded nothing within 20 s of its start")
    return first - backend.launched


def crowded_memory(kind: type[BackEnd], cpus: tuple[int, int]) -> int:
    """Resident memory in bytes, without the guests', when all ports of a back-end with many are connected."""
    with tempfile.TemporaryDirectory(prefix="viaduct-bench-") as directory, ExitStack() as stack:
        backend = stack.enter_context(kind(Path(directory), cpus[0]))
        backend.start()
        backend.settle()
        guests: frozenset[tuple[str, str]] = frozenset()
        for first in range(0, kind.ports, PORTS_MAX):
            generator = stack.enter_context(Generator(backend.sockets[first : first + PORTS_MAX], _MODE, cpus[1]))
            generator.ready()
            generator.wait_for_traffic()
            guests |= generator.program.mapped_files()
        return backend.program().footprint(guests).small_pages


def measure(kind: type[BackEnd], cpus: tuple[int, int], *, starts: int, seconds: float) -> Footprint:
    """Start `starts` times, then look at one that is idle and one that carries 10,000 packets a second."""
    first = [_first_packet(kind, *cpus) for _ in range(starts)]
    with tempfile.TemporaryDirectory(prefix="viaduct-bench-") as directory, kind(Path(directory), cpus[0]) as backend:
        backend.start()
        backend.settle()
        with Generator(backend.sockets, _MODE, cpus[1]) as generator:
            generator.ready()
            generator.wait_for_traffic()
            generator.announce(Load())
            generator.run(Load(), seconds=0.3)
            memory = backend.program().footprint(generator.program.mapped_files())
            time.sleep(1)
            idle = _cpu_share(backend, seconds)
            load = Load(rate=10_000)
            generator.begin(load, seconds + 1)
            time.sleep(0.5)
            busy = _cpu_share(backend, seconds)
            generator.end(seconds + 1)
    return Footprint(
        own_small=memory.small_pages,
        own_huge=memory.huge_pages,
        cpu_idle=round(idle, 4),
        cpu_10k=round(busy, 4),
        first_packet=[round(t, 3) for t in first],
        first_packet_median=round(statistics.median(first), 3),
    )
