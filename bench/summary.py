"""From rounds to figures: medians and spreads, and ratios taken within a round."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from bench.interleave import Round, Slot, good

FEWEST = 3
"""So many good rounds are needed before the others are left out."""

Basis = Literal["near, undisturbed", "near", "far", "all"]


class Spread(msgspec.Struct, frozen=True):
    """A median with the 10th and 90th percentile of `n` values."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Iterable[float]) -> Spread | None:
    ordered = sorted(values)
    if not ordered:
        return None
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


def choose(rounds: Sequence[Round]) -> tuple[Basis, list[Round]]:
    """The rounds that the figures rest on, and what they have in common."""
    undisturbed = [slots for slots in rounds if good(slots)]
    if len(undisturbed) >= FEWEST:
        return "near, undisturbed", undisturbed
    bases: tuple[Basis, Basis] = ("near", "far")
    for basis in bases:
        alike = [slots for slots in rounds if all(slot.placement == basis for slot in slots.values())]
        if len(alike) >= FEWEST:
            return basis, alike
    return "all", list(rounds)


def figures(rounds: Sequence[Round], name: str, value: Callable[[Slot], float]) -> Spread | None:
    """Median and spread of one back-end's value over the rounds it took part in."""
    return spread(value(slots[name]) for slots in rounds if name in slots)


def ratio(rounds: Sequence[Round], name: str, peer: str, value: Callable[[Slot], float]) -> Spread | None:
    """Median and spread of the ratio between two back-ends in the same round."""
    return spread(
        value(slots[name]) / value(slots[peer])
        for slots in rounds
        if name in slots and peer in slots and value(slots[peer]) > 0
    )
