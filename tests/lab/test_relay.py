"""Tests in the lab, when the lab dies under them: played by a lab that does what it is told."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import pytest

from lab import relay

TESTS = ("one", "two", "three", "four")


class PlayedLab:
    """Passes the tests that it is started with until it comes to one of `deaths`, each of which counts once.

    It then ends as that says: "dies", "still" (without a pulse), "stuck" (with one), or a status of pytest's.
    """

    deaths: ClassVar[list[tuple[str, str]]] = []
    started_with: ClassVar[list[list[str]]] = []

    def __init__(self, command: Sequence[str]) -> None:
        tests = [word for word in command if word in TESTS]
        self.started_with.append(tests)
        ends = {name: os.pipe() for name in ("stdout", "stderr", "status", "reports", "pulse")}
        self.output: dict[str, IO[bytes]] = {name: os.fdopen(ends[name][0], "rb", buffering=0) for name in ends}
        writers = {name: os.fdopen(ends[name][1], "wb", buffering=0) for name in ends}
        how = ""
        for test in tests:
            writers["reports"].write(report(test, "setup"))
            if self.deaths and self.deaths[0][0] == test:
                how = self.deaths.pop(0)[1]
                break
            writers["reports"].write(report(test, "call") + report(test, "teardown"))
        if how.isdecimal():
            writers["status"].write(how.encode())
        self._kept = list(writers.values()) if how in ("still", "stuck") else []
        if how == "stuck":
            writers["pulse"].write(b"\n")
        for writer in writers.values():
            if writer not in self._kept:
                writer.close()

    def evidence(self) -> str:
        """What a failure shows."""
        return "its last words"

    def close(self) -> None:
        """All of its pipes."""
        for stream in (*self._kept, *self.output.values()):
            stream.close()


def report(test: str, when: str) -> bytes:
    """A line of the port."""
    made = pytest.TestReport(test, (test, 0, test), {}, "passed", None, when, ())  # type: ignore[arg-type]
    return json.dumps(made._to_json() | {"$report_type": "TestReport"}).encode() + b"\n"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedLab]:
    """Labs that are played, and little patience with them."""
    monkeypatch.setattr(relay, "Lab", PlayedLab)
    monkeypatch.setattr(PlayedLab, "deaths", [])
    monkeypatch.setattr(PlayedLab, "started_with", [])
    return PlayedLab


def run(config: pytest.Config) -> tuple[relay.LabSession, dict[str, str]]:
    """All tests, and how each ended: "passed", or why not."""
    items: list[Any] = [SimpleNamespace(nodeid=test, location=(test, 0, test)) for test in TESTS]
    session = relay.LabSession(config, items)
    ends = {}
    for item in items:
        reports = session._reports(item)
        failed = [str(one.longrepr) for one in reports if one.failed]
        assert failed or [one.when for one in reports] == ["setup", "call", "teardown"]
        ends[item.nodeid] = "; ".join(failed) or "passed"
    session.close()
    return session, ends


def test_all_run_in_one_lab(played: type[PlayedLab], pytestconfig: pytest.Config) -> None:
    session, ends = run(pytestconfig)
    assert ends == dict.fromkeys(TESTS, "passed")
    assert played.started_with == [list(TESTS)]
    assert session.deaths == []


@pytest.mark.parametrize("how", ["dies", "still"])
def test_another_lab_runs_what_is_left(
    how: str, played: type[PlayedLab], pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginning with the test that the first one was at; and it is told."""
    monkeypatch.setattr(relay, "PULSE_MAX", 0.1)
    played.deaths = [("two", how)]
    session, ends = run(pytestconfig)
    assert ends == dict.fromkeys(TESTS, "passed")
    assert played.started_with == [list(TESTS), ["two", "three", "four"]]
    assert [test for test, _ in session.deaths] == ["two"]


def test_a_test_that_two_labs_die_at_fails(played: type[PlayedLab], pytestconfig: pytest.Config) -> None:
    played.deaths = [("two", "dies"), ("two", "dies")]
    _, ends = run(pytestconfig)
    assert "2 labs have died at this test" in ends.pop("two")
    assert ends == dict.fromkeys(("one", "three", "four"), "passed")
    assert played.started_with[2] == ["three", "four"]


def test_no_lab_follows_the_third(played: type[PlayedLab], pytestconfig: pytest.Config) -> None:
    played.deaths = [("one", "dies"), ("two", "dies"), ("three", "dies")]
    _, ends = run(pytestconfig)
    assert [ends["one"], ends["two"]] == ["passed", "passed"]
    assert all("3 labs have died" in ends[test] for test in ("three", "four"))
    assert len(played.started_with) == 3


def test_a_test_that_does_not_end_is_not_tried_again(
    played: type[PlayedLab], pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the lab lives, that is no failure of the lab's; the others get another one, though."""
    monkeypatch.setattr(relay, "SILENCE_MAX", 0.1)
    played.deaths = [("two", "stuck")]
    session, ends = run(pytestconfig)
    assert "no test in the lab has ended" in ends.pop("two")
    assert ends == dict.fromkeys(("one", "three", "four"), "passed")
    assert session.deaths == []


def test_pytest_that_leaves_fails_what_is_left(played: type[PlayedLab], pytestconfig: pytest.Config) -> None:
    """A crash of it is a defect of ours, perhaps."""
    played.deaths = [("three", "139")]
    _, ends = run(pytestconfig)
    assert [ends["one"], ends["two"]] == ["passed", "passed"]
    assert all("left with status 139" in ends[test] for test in ("three", "four"))
    assert len(played.started_with) == 1
