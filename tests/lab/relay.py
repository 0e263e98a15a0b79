"""Tests that pytest collects here, and runs in the lab.

On the host, the first test marked `lab` starts a lab, and in it pytest with all marked tests of the session. That
pytest loads this module as a plugin and writes each report, as a line of JSON, to a port; the host's pytest hands the
reports of a test to its own plugins when it is that test's turn. So one boot serves all tests, their results appear one
by one, and `-k`, `-x`, `--junit-xml` and the like work as ever. A lab that dies fails the test it was at, and all that
it did not come to, with what its console said last.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Sequence
from typing import IO

import pytest

from .machine import Lab
from .packages import LabError

SILENCE_MAX = 1500.0
"""Seconds without a report after which the lab is given up: more than one test may take (conftest.py)."""
IN_LAB = "VIADUCT_IN_LAB" in os.environ


class LabSession:
    """The tests of one session that run in the lab, and the lab once the first of them is due."""

    def __init__(self, config: pytest.Config, tests: Sequence[pytest.Item]) -> None:
        self._config = config
        self._tests = [item.nodeid for item in tests]
        self._lab: Lab | None = None
        self._received = b""
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
        try:
            while not (self._failure or _complete(self._early.get(item.nodeid, []))):
                report = self._next()
                self._early.setdefault(report.nodeid, []).append(report)
        except LabError as error:
            self._failure = str(error)
            self.close()
        reports = self._early.pop(item.nodeid, [])
        if not _complete(reports):
            now = time.time()
            reports.append(
                pytest.TestReport(
                    item.nodeid, item.location, {}, "failed", self._failure, "call", (), now - begin, begin, now
                )
            )
        return reports

    def _next(self) -> pytest.TestReport:
        """The next report out of the lab. Raises LabError when there will be none."""
        if self._lab is None:
            self._lab = Lab(["python3", "-m", "pytest", "-p", "lab.relay", *_QUIET, *self._tests])
        reports = self._lab.output["reports"]
        while b"\n" not in self._received:
            data = self._read(reports)
            if not data:
                raise LabError(f"the lab ended without having run this test.\n{self._last_words()}")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
        assert isinstance(report, pytest.TestReport)
        return report

    def _read(self, reports: IO[bytes]) -> bytes:
        """What comes next on the port of reports; what pytest prints in the lab is of interest only when it ends."""
        assert self._lab is not None
        end = time.monotonic() + SILENCE_MAX
        streams = [reports, self._lab.output["stdout"], self._lab.output["stderr"]]
        while readable := select.select(streams, [], [], max(end - time.monotonic(), 0))[0]:
            if reports in readable:
                return os.read(reports.fileno(), 1 << 20)
            for stream in readable:
                data = os.read(stream.fileno(), 65536)
                self._printed = (self._printed + data)[-8000:]
                if not data:
                    streams.remove(stream)
        raise LabError(f"no test in the lab has ended for {SILENCE_MAX:.0f} s.\n{self._last_words()}")

    _printed = b""

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
