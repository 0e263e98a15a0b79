"""Tests that pytest collects here, and runs in the lab.

On the host, the first test marked `lab` starts a lab, and in it pytest with all marked tests of the session. That
pytest loads this module as a plugin and writes each report, as a line of JSON, to a port; the host's pytest hands the
reports of a test to its own plugins when it is that test's turn. So one boot serves all tests, their results appear one
by one, and `-k`, `-x`, `--junit-xml` and the like work as ever.

A lab that dies under a test, as a whole, was let down by its emulator or its kernel: what the tests run are programs in
it, ours among them. So another lab is started for the tests that are left, this one included, and the summary of the
session names it. The test at which two labs died fails, and after three labs all that are left do, with what the
last one's console said. A pytest that ends or stands still in a lab that lives is no such case: it fails tests at once.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Sequence
from typing import NoReturn

import pytest

from .machine import Lab
from .packages import LabError

PULSE_MAX = 180.0
"""Seconds without its pulse (lab_init.sh, every five seconds) after which the lab stands still."""
SILENCE_MAX = 900.0
"""Seconds without a report after which pytest in the lab does: more than one test may take (conftest.py)."""
LABS_MAX = 3
DEATHS_MAX = 2
"""Of labs at the same test."""
IN_LAB = "VIADUCT_IN_LAB" in os.environ


class LabDied(LabError):
    """The lab, all of it, ended or stood still while it had something to do."""


class TestStuck(LabError):
    """A test in the lab does not even end by its time-out."""

    __test__ = False


class LabSession:
    """The tests of one session that run in the lab, and the lab once the first of them is due."""

    def __init__(self, config: pytest.Config, tests: Sequence[pytest.Item]) -> None:
        self.deaths: list[tuple[str, str]] = []
        """For each lab that died: the test it was at, and how."""
        self._config = config
        self._left = [item.nodeid for item in tests]
        self._lab: Lab | None = None
        self._received = b""
        self._printed = b""
        self._early: dict[str, list[pytest.TestReport]] = {}
        self._failure = ""

    def run(self, item: pytest.Item) -> None:
        """Wait for one test's reports and pass them on."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        begin = time.time()
        failure = self._failure
        while not (failure or _complete(self._early.get(item.nodeid, []))):
            try:
                report = self._next()
                self._early.setdefault(report.nodeid, []).append(report)
                if report.when == "teardown":
                    self._left.remove(report.nodeid)
            except LabDied as death:
                failure = self._died(item, death)
            except TestStuck as stuck:
                self.close()
                self._left.remove(item.nodeid)
                failure = str(stuck)
            except LabError as error:
                failure = self._failure = str(error)
        reports = self._early.pop(item.nodeid, [])
        if not _complete(reports):
            now = time.time()
            reports.append(
                pytest.TestReport(
                    item.nodeid, item.location, {}, "failed", failure, "call", (), now - begin, begin, now
                )
            )
        return reports

    def _died(self, item: pytest.Item, death: LabDied) -> str:
        """Take note of a lab's death at a test, which is forgotten; why the test fails, if it has to."""
        self.close()
        self.deaths.append((item.nodeid, str(death).split("\n", 1)[0]))
        self._early = {nodeid: reports for nodeid, reports in self._early.items() if _complete(reports)}
        if len(self.deaths) == LABS_MAX:
            self._failure = f"{LABS_MAX} labs have died, and no other is started. The last one: {death}"
            return self._failure
        if [nodeid for nodeid, _ in self.deaths].count(item.nodeid) < DEATHS_MAX:
            return ""
        self._left.remove(item.nodeid)
        return f"{DEATHS_MAX} labs have died at this test. The last one: {death}"

    def _next(self) -> pytest.TestReport:
        """The next report out of the lab. Raises LabError when there will be none."""
        if self._lab is None:
            self._received = self._printed = b""
            self._lab = Lab(["python3", "-m", "pytest", "-p", "lab.relay", *_QUIET, *self._left])
        while b"\n" not in self._received:
            data = self._read()
            if not data:
                self._ended()
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
        assert isinstance(report, pytest.TestReport)
        return report

    def _ended(self) -> NoReturn:
        """Raise what it means that the lab has ended with tests left."""
        assert self._lab is not None
        if status := self._lab.output["status"].read().strip().decode():
            raise LabError(f"pytest in the lab left with status {status} before this test.\n{self._last_words()}")
        raise LabDied(f"the lab ended before this test did.\n{self._last_words()}")

    def _read(self) -> bytes:
        """What comes next on the port of reports; what pytest prints in the lab is of interest only when it ends."""
        assert self._lab is not None
        output = self._lab.output
        reports, pulse = output["reports"], output["pulse"]
        streams = [reports, pulse, output["stdout"], output["stderr"]]
        last_pulse = start = time.monotonic()
        while True:
            readable = select.select(streams, [], [], 1)[0]
            if reports in readable:
                return os.read(reports.fileno(), 1 << 20)
            now = time.monotonic()
            for stream in readable:
                data = os.read(stream.fileno(), 65536)
                if not data:
                    streams.remove(stream)
                elif stream is pulse:
                    last_pulse = now
                else:
                    self._printed = (self._printed + data)[-8000:]
            if now - last_pulse > PULSE_MAX:
                raise LabDied(f"the lab stands still: no pulse for {PULSE_MAX:.0f} s.\n{self._last_words()}")
            if now - start > SILENCE_MAX:
                raise TestStuck(f"no test in the lab has ended for {SILENCE_MAX:.0f} s.\n{self._last_words()}")

    def _last_words(self) -> str:
        assert self._lab is not None
        return f"pytest in the lab:\n{self._printed.decode(errors='replace')}\n{self._lab.evidence()}"

    def close(self) -> None:
        """End the lab."""
        if self._lab is not None:
            self._lab.close()
            self._lab = None


_QUIET = ("-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", "/viaduct")


def _complete(reports: Sequence[pytest.TestReport]) -> bool:
    return any(report.when == "teardown" for report in reports)


# In the lab: the reports' other end.

if IN_LAB:
    _port = open(os.environ["VIADUCT_LAB_REPORTS"], "wb", buffering=0)  # noqa: SIM115

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(report: pytest.TestReport) -> None:
        """Send each report to the host."""
        data = report._to_json() | {"$report_type": "TestReport"}
        _port.write(json.dumps(data).encode() + b"\n")
