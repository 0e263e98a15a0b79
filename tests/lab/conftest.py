"""Tests marked `lab` run in the lab, wherever pytest was started; fixtures of theirs."""

from __future__ import annotations

import pytest

from .relay import IN_LAB, LabSession

SECONDS = 600
"""For one test in the lab, whatever happens: a guest boots there in 5 to 10 s, or minutes on a crowded host."""
_session = pytest.StashKey[LabSession]()
_deaths = pytest.StashKey[list[tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker that sends a test to the lab."""
    config.addinivalue_line("markers", "lab: runs in the lab, a machine with hardware virtualization (docs/lab.md)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the lab a test's time is bounded; on the host the lab's silence is (relay.py)."""
    for item in items:
        if _runs_in_lab(item):
            item.add_marker(pytest.mark.timeout(SECONDS if IN_LAB else 0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Let the lab run the test, if it is marked and this is not the lab."""
    if IN_LAB or not _runs_in_lab(item):
        return None
    if _session not in item.session.stash:
        tests = [other for other in item.session.items if _runs_in_lab(other)]
        item.session.stash[_session] = LabSession(item.config, tests)
    item.session.stash[_session].run(item)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the lab, however the session ended."""
    if _session in session.stash:
        session.stash[_session].close()
        session.config.stash[_deaths] = session.stash[_session].deaths


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the labs that died."""
    deaths = config.stash.get(_deaths, [])
    for nodeid, how in deaths:
        terminalreporter.write_line(f"lab: one died at {nodeid}: {how}")
    if deaths:
        terminalreporter.write_line(f"lab: {len(deaths)} died, and others were started (docs/lab.md)")


def _runs_in_lab(item: pytest.Item) -> bool:
    return item.get_closest_marker("lab") is not None
