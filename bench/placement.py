"""Whether two virtual CPUs were near each other (a shared cache) while something was measured. See placement.c."""

import bisect
import threading
from typing import Literal

import msgspec

from bench import programs
from bench.process import Program, ProgramError

NEAR_NS = 140.0
"""A cache line's round trip up to here means a shared last-level cache; across a link between caches it takes 260."""

PERIOD_MS = 25

Placement = Literal["near", "far", "mixed", "unknown"]


class _Probe(msgspec.Struct, frozen=True):
    time: float
    round_trip_ns: float | None
    tsc_hz: float


class PlacementProbe:
    """Runs beside the measurements from `start` to `stop`, about 0.2 % of each CPU."""

    def __init__(self, cpus: tuple[int, int]) -> None:
        self._program = Program("placement", [str(programs.placement()), *map(str, cpus), str(PERIOD_MS)])
        self._probes: list[_Probe] = []
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        try:
            while True:
                self._probes.append(msgspec.json.decode(self._program.line(10), type=_Probe))
        except ProgramError:
            return

    def during(self, start: float, end: float) -> list[float]:
        """The round trips in nanoseconds seen between two times of the epoch."""
        self._program.check()
        probes = list(self._probes)
        first = bisect.bisect_left(probes, start, key=lambda probe: probe.time)
        return [p.round_trip_ns for p in probes[first:] if p.time <= end and p.round_trip_ns is not None]

    def tsc_hz(self) -> int:
        """The rate of the time-stamp counter. Known some seconds after the start to a few parts in a million."""
        self._program.check()
        return round(self._probes[-1].tsc_hz) if self._probes else 0

    def stop(self) -> None:
        self._program.stop()
        self._thread.join()


def classify(round_trips: list[float]) -> Placement:
    """One word for the probes of a sample; a stray probe of the other kind among many does not change it."""
    if len(round_trips) < 3:
        return "unknown"
    far = sum(ns > NEAR_NS for ns in round_trips) / len(round_trips)
    return "near" if far <= 0.1 else "far" if far >= 0.9 else "mixed"
