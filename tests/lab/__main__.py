"""`python -m lab` (with tests/ in PYTHONPATH): a command or a shell in the lab. `make lab-shell` is the latter."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from typing import IO

from .image import lab_image
from .machine import IOMMUS, Hardware, Lab
from .packages import LabError


def _copy(source: IO[bytes], to: IO[bytes]) -> None:
    while data := source.read(65536):
        to.write(data)
        to.flush()


def _run(lab: Lab, seconds: float) -> int:
    copies = [
        threading.Thread(target=_copy, args=(lab.output[name], to), daemon=True)
        for name, to in (("stdout", sys.stdout.buffer), ("stderr", sys.stderr.buffer))
    ]
    for copy in copies:
        copy.start()
    alarm = threading.Timer(seconds, lab.kill)
    alarm.start()
    try:
        status = lab.wait()
    finally:
        alarm.cancel()
    for copy in copies:
        copy.join()
    return status


def main() -> int:
    """Build, run or shell; leaves with the command's status, or 125 when the lab failed."""
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build", help="make the images, if they are not there")
    for verb, what in (("run", "run a command and leave with its status"), ("shell", "a shell on this terminal")):
        options = verbs.add_parser(verb, help=what)
        options.add_argument("--processors", type=int, default=Hardware.processors)
        options.add_argument("--memory", default=Hardware.memory)
        options.add_argument("--iommu", choices=IOMMUS, default=Hardware.iommu)
        options.add_argument("--share", type=Path, action="append", default=[], help="a directory to show in the lab")
        if verb == "run":
            options.add_argument("--seconds", type=float, default=600, help="after which the run is ended")
            options.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    arguments = parser.parse_args()
    command = getattr(arguments, "command", [])
    command = command[1:] if command[:1] == ["--"] else command
    if arguments.verb == "run" and not command:
        parser.error("run: which command?")
    try:
        image = lab_image()
        if arguments.verb == "build":
            return 0
        hardware = Hardware(arguments.processors, arguments.memory, arguments.iommu)
        with Lab(command, arguments.share, hardware, image) as lab:
            if arguments.verb == "run":
                return _run(lab, arguments.seconds)
            lab.wait_shell()
            return 0
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
