"""What a run of the benchmark leaves behind: one JSON file from which tables and plots are made."""

import os
import platform
import re
import subprocess
from pathlib import Path

import msgspec

from bench.footprint import Footprint
from bench.generator import RING_MODES, Load
from bench.interleave import Round
from bench.pollers import PollerRound
from bench.streams import Streams

RESULTS = Path(__file__).parent / "results"


class Machine(msgspec.Struct, frozen=True):
    """Where it ran, and which versions."""

    processor: str
    cpus: int
    kernel: str
    versions: dict[str, str]


class Cell(msgspec.Struct, frozen=True):
    """All rounds under one load in one ring mode. `part` names the question it belongs to: modes, stations, latency."""

    part: str
    mode: str
    load: Load
    rounds: list[Round] = []

    def __str__(self) -> str:
        return f"{self.part}: {RING_MODES[self.mode].title}, {self.load.words()}"


class Report(msgspec.Struct):
    """One run. `titles`: what to call each back-end; `failures`: what did not work, in words."""

    suite: str
    date: str
    seconds: float
    machine: Machine
    titles: dict[str, str]
    cells: list[Cell] = []
    footprints: dict[str, Footprint] = {}
    crowded_memory: dict[str, int] = {}
    """Bytes resident by the name of a back-end with many ports."""
    streams: list[Streams] = []
    pollers: list[PollerRound] = []
    failures: list[str] = []

    def save(self) -> Path:
        """Write it as bench/results/SUITE.json."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.suite}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=0) + b"\n")
        return path


def load(suite: str) -> Report:
    """Read what `save` wrote. Raises FileNotFoundError."""
    return msgspec.json.decode((RESULTS / f"{suite}.json").read_bytes(), type=Report)


def _version(*command: str) -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except FileNotFoundError:
        return "not installed"
    found = re.search(r"\d+\.\d+(\.\d+)?", output)
    return found[0] if found else "unknown"


def machine(viaduct: list[str] | None) -> Machine:
    """The machine this runs on; `viaduct` is the command of our switch."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return Machine(
        processor=model[1] if model else platform.machine(),
        cpus=os.cpu_count() or 0,
        kernel=platform.release(),
        versions={
            "DPDK": _version("pkg-config", "--modversion", "libdpdk"),
            "Open vSwitch": _version("ovs-vsctl", "--version"),
            "Viaduct": _version(*viaduct, "--version") if viaduct else "not installed",
        },
    )
