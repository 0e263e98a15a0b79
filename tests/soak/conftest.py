"""The soak tests: the same faults again and again, at random moments, under traffic.

Each test has two forms. The short one is part of `make test` and shows that the test itself is sound; the long one,
`make soak` (``pytest tests/soak --soak``), has the counts that docs/reliability.md speaks of. A test asks the fixture
`soak` for both: what to do how often, where chance comes from, and whom to tell what was measured.

    def test_something(soak: Soak) -> None:
        for round in soak.rounds(6, 200):
            time.sleep(soak.random.uniform(0, 0.5))
            ...
        soak.measured("longest gap", gap, "s", limit=0.05)

Chance is seeded: the seed is printed, and $VIADUCT_SOAK_SEED repeats it. Limits in units of time hold in the long form
only, on a machine that does nothing else; the short form prints what it measured and goes on.
"""

from __future__ import annotations

import os
import random
import secrets
from pathlib import Path

import pytest
from interop.conftest import directory, image, pytest_runtest_makereport

__all__ = ["directory", "image", "pytest_runtest_makereport"]

HERE = Path(__file__).parent
SEED = "VIADUCT_SOAK_SEED"
SHORT_SECONDS, LONG_SECONDS = 600, 6 * 3600
"""For one test, whatever happens. Nothing is to be learned from these: they end what hangs."""

_lines: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long form is chosen on the command line, or by $VIADUCT_SOAK=1."""
    parser.addoption("--soak", action="store_true", help="the soak tests' full counts and limits: takes hours")


def is_long(config: pytest.Config) -> bool:
    """Whether the long form was asked for."""
    return bool(config.getoption("--soak", default=False)) or os.environ.get("VIADUCT_SOAK", "") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker that selects these tests."""
    config.addinivalue_line("markers", "soak: the same faults again and again, under traffic")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test of this directory."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.soak)
            item.add_marker(pytest.mark.timeout(LONG_SECONDS if is_long(config) else SHORT_SECONDS))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was measured, and by which chance."""
    if _lines:
        terminalreporter.section("soak")
        for line in _lines:
            terminalreporter.line(line)


class Soak:
    """One soak test: its form, its chance, and its findings."""

    def __init__(self, name: str, long: bool, seed: int) -> None:
        self.name = name
        self.long = long
        self.seed = seed
        self.random = random.Random(f"{name} {seed}")
        """To be used for every choice of the test."""

    def of(self, short: int, long: int) -> int:
        """The number that goes with the form."""
        return long if self.long else short

    def rounds(self, short: int, long: int) -> range:
        """So many rounds."""
        return range(self.of(short, long))

    def measured(self, what: str, value: float, unit: str = "", limit: float | None = None) -> None:
        """Print a finding. Fails in the long form, if `value` is above `limit`."""
        allowed = "" if limit is None else f" (at most {limit:g}{' ' * bool(unit)}{unit})"
        self.say(f"{what}: {value:.6g}{' ' * bool(unit)}{unit}{allowed}")
        if limit is not None and self.long:
            assert value <= limit, f"{what} is {value:g} {unit}, more than {limit:g}; {SEED}={self.seed} repeats it"

    def say(self, text: str) -> None:
        """Print a line after the tests."""
        _lines.append(f"{self.name}: {text}")


@pytest.fixture(scope="session")
def soak_seed() -> int:
    """$VIADUCT_SOAK_SEED, or one that nobody chose."""
    text = os.environ.get(SEED)
    return int(text, 0) if text else secrets.randbits(32)


@pytest.fixture
def soak(request: pytest.FixtureRequest, soak_seed: int) -> Soak:
    """The test's form, chance and findings."""
    made = Soak(request.node.name, is_long(request.config), soak_seed)
    print(f"{SEED}={soak_seed}")  # shown with a failure
    made.say(f"{'long' if made.long else 'short'} form, {SEED}={soak_seed}")
    return made
