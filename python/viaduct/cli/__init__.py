"""The command `viaduct`.

One module a command, and only the module of the command that was typed is loaded, because the time from start to first
packet counts: a module of this package imports at its top only what its signature needs, and the rest inside the
function.

Exit codes: 0 done; 1 it failed, or the switch refused; 2 wrong usage or configuration; 3 no switch or machine answers;
128 + N ended by signal N (130: Ctrl-C). `viaduct run` has its guest's, if that says one.
"""

from __future__ import annotations

import sys
from typing import Any

COMMANDS = {
    "demo": "viaduct.cli.demo:demo",
    "run": "viaduct.cli.run:run",
    "up": "viaduct.cli.up:up",
    "vm": "viaduct.cli.vm:app",
    "switch": "viaduct.cli.switch:switch",
    "upgrade": "viaduct.cli.upgrade:upgrade",
    "port": "viaduct.cli.port:app",
    "status": "viaduct.cli.status:status",
    "stats": "viaduct.cli.stats:stats",
    "macs": "viaduct.cli.macs:macs",
    "events": "viaduct.cli.events:events",
    "capture": "viaduct.cli.capture:capture",
    "trace": "viaduct.cli.trace:trace",
    "doctor": "viaduct.cli.doctor:doctor",
    "device": "viaduct.cli.device:app",
    "guest": "viaduct.cli.guest:app",
    "send": "viaduct.cli.traffic:send",
    "receive": "viaduct.cli.traffic:receive",
}
"""Every command: where its function stands, or its `typer.Typer` if it has commands of its own."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command line (default: that of the process) and exit with its code."""
    from .failure import Failure

    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["run"]:
            _run(words[1:])
        application(words)(args=words, prog_name="viaduct")
    except Failure as failure:
        print(f"viaduct: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)


def _run(words: list[str]) -> None:
    """Runs a machine, and exits with its code, if that can be done without typer."""
    import os

    from .run_words import read

    if "_VIADUCT_COMPLETE" in os.environ or (plain := read(words)) is None:
        return
    from .machine_run import run_configured

    told, others = plain
    try:
        sys.exit(run_configured(told, **others))
    except KeyboardInterrupt:
        sys.exit(130)


def application(words: list[str]) -> Any:
    """The typer application for a command line: with the one command it names, or with all for help and completion."""
    import os

    from .root import build

    command = next((word for word in words if not word.startswith("-")), None)
    completing = "_VIADUCT_COMPLETE" in os.environ
    return build([command] if command in COMMANDS and not completing else list(COMMANDS))
