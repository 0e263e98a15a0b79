"""The page that follows a port write quotes lines of the sources: they are where it says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "exit.md"
STEP = re.compile(r"^\d+\. \[([\w/.]+):(\d+)\]\(\.\./([\w/.]+)\):\n +`(.+)`$", re.MULTILINE)


def test_every_quoted_line_is_where_the_page_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    steps = STEP.findall(text)
    assert len(steps) == len(re.findall(r"^\d+\. ", text, re.MULTILINE)) > 10
    wrong = []
    for path, number, target, code in steps:
        assert path == target
        lines = [line.strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
        if lines[int(number) - 1 : int(number)] != [code]:
            found = [at for at, line in enumerate(lines, 1) if line == code]
            wrong.append(f"{path}:{number}: {code} is in line {found or 'none'}")
    assert not wrong, "docs/exit.md: " + "; ".join(wrong)
