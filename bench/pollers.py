"""What a second poller adds on port pairs of its own.

Two pollers and what would keep them busy do not fit on two CPUs. So a program (crates/switch/examples/pollers.rs) fills
long rings first, and lets the pollers work through them with nobody else running: one alone, the other alone, then both
at once. Each poller's own count of frames and busy time says how much they take from each other.
"""

import subprocess

import msgspec

from bench import programs, summary
from bench.process import ProgramError

_PATIENCE_S = 60


class PollerRound(msgspec.Struct, frozen=True):
    """Frames for each second of a poller's own busy time, by poller: `alone`, and `together` with the other."""

    alone: list[float]
    together: list[float]

    @property
    def gain(self) -> float:
        """What both carry, in terms of what one carries alone: 2 if neither slows the other."""
        return sum(self.together) / (sum(self.alone) / len(self.alone))


def measure(cpus: tuple[int, int], rounds: int) -> list[PollerRound]:
    """So many rounds on these CPUs. Raises ProgramError, BuildError."""
    program = programs.example("pollers")
    try:
        done = subprocess.run(
            [str(program), *map(str, cpus), str(rounds)], capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise ProgramError(f"{program.name} has not ended within {_PATIENCE_S} s") from None
    if done.returncode:
        raise ProgramError(f"{program.name} left with status {done.returncode}: {done.stderr}")
    return [msgspec.json.decode(line, type=PollerRound) for line in done.stdout.splitlines()]


def gain(rounds: list[PollerRound]) -> summary.Spread | None:
    """Median and spread of what two pollers carry in terms of one."""
    return summary.spread(each.gain for each in rounds)
