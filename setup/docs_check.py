"""Checks the documentation: links lead somewhere, commands and options in it exist, targets of make as well.

Looks at every Markdown file that git knows: relative links and their anchors; words after `viaduct` in code, against
the command line itself; words after `make`, against the Makefile.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|[\s`/|])viaduct ((?:-{1,2}\w|[a-z])[^`|\n#]*)")
MAKE = re.compile(r"^make ([a-z][a-z-]*)")
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Links of one page that lead nowhere."""
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in anchors(linked.read_text(encoding="utf-8")):
            yield f"link to {target}: no such heading"


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def code_lines(text: str) -> Iterator[str]:
    """Commands as somebody would type them: code lines with a prompt, joined at backslashes, and inline code."""
    for block in CODE_BLOCK.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if line.startswith(("$ ", "# ")):
                yield line[2:]
    yield from re.findall(r"`([^`\n]+)`", CODE_BLOCK.sub("", text))


def wrong_commands(text: str, root: Any) -> Iterator[str]:
    """Commands and options of `viaduct` that do not exist."""
    for line in code_lines(text):
        for match in COMMAND.finditer(" " + line):
            words = match[1].split()
            command = root
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            if words and ".py:" in words[0] and "MODULE.py:CLASS" in getattr(command, "commands", {}):
                command = command.commands["MODULE.py:CLASS"]
            if command is root and words and re.fullmatch(r"[a-z]+", words[0]):
                yield f"viaduct {match[1].strip()!r}: no such command"
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(words)):
                if option not in known | {"--help", "-h"}:
                    yield f"viaduct {match[1].strip()!r}: no option {option}"


def main() -> int:
    """Check every page and say what is wrong."""
    from typer.main import get_command

    from viaduct.cli import COMMANDS
    from viaduct.cli.root import build

    root = get_command(build(list(COMMANDS)))
    targets = set(TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    wrong = []
    for name in listed.split():
        text = (ROOT / name).read_text(encoding="utf-8")
        found = [*broken_links(ROOT / name, text), *wrong_commands(text, root)]
        typed = [word for line in code_lines(text) for word in MAKE.findall(line)]
        found += [f"make {word}: no such target" for word in typed if word not in targets]
        wrong += [f"{name}: {problem}" for problem in found]
    print("\n".join(wrong) or f"documentation: {len(listed.split())} pages, every link and command leads somewhere")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
