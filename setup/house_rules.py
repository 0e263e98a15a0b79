"""The rules of this repository that no other tool checks. Prints what breaks one, and fails if anything does.

One concept a file, so that no source file needs more than 600 lines; file names that say what is inside; nothing left
for later; the specifications' own words.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LINES_MAX = 600
SOURCES = (".py", ".pyi", ".rs", ".sh", ".c")
SAYS_NOTHING = re.compile(r"(?:.*_)?(?:utils?|helpers?|common|misc|manager)")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|unimplemented!|todo!)\b")
OLD_WORDS = re.compile(r"\b(?:slave|master)\b", re.IGNORECASE)
THIS_FILE = Path(__file__).resolve()


def broken_rules(path: Path) -> list[str]:
    """What is wrong with one file, a line each."""
    found = []
    if SAYS_NOTHING.fullmatch(path.stem):
        found.append(f"{path}: the name says nothing about what is inside")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > LINES_MAX:
        found.append(f"{path}: {len(lines)} lines; at most {LINES_MAX}, so take one concept out into its own file")
    for number, line in enumerate(lines, 1):
        for pattern, complaint in ((UNFINISHED, "unfinished"), (OLD_WORDS, "say driver/device, front-end/back-end")):
            if match := pattern.search(line):
                found.append(f"{path}:{number}: {match[0]}: {complaint}")
    return found


def main() -> int:
    """Check every source file that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        text=True,
    )
    paths = [Path(name) for name in listed.stdout.split("\0") if name.endswith(SOURCES)]
    found = [line for path in paths if path.exists() and path.resolve() != THIS_FILE for line in broken_rules(path)]
    print("\n".join(found) or f"house rules: {len(paths)} files keep them")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
