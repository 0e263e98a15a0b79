"""What happens in a running switch, as lines: for people, or JSON for programs.

Theory of operation
-------------------
Every line is an `Event` of `viaduct.switch.status`, whether it comes from the switch, from the process around it
(`ready`, `reloaded`) or from a Python logger. The JSON lines are those of `viaduct events --json`. Loggers speak of
some things that are events too; those records are marked as `reported` and are not shown twice.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any, Literal

import msgspec

from viaduct.switch.event_log import LEVELS
from viaduct.switch.status import Event, Level

from .rates import event_line

LogFormat = Literal["text", "json"]


class LogLines(logging.Handler):
    """Prints events, one a line, at once."""

    def __init__(self, switch: Any, log_format: LogFormat = "text") -> None:
        super().__init__(logging.WARNING)
        self.switch = switch
        self._line = _json_line if log_format == "json" else event_line
        logging.getLogger().addHandler(self)

    async def follow(self) -> None:
        """Print events until cancelled."""
        async for event in self.switch.events():
            self.show(self._line(event))

    def show(self, line: str) -> None:
        """Print a line at once, as long as anybody reads."""
        with suppress(BrokenPipeError):
            print(line, flush=True)

    def say(self, kind: str, message: str) -> None:
        """Print what the process itself has to say."""
        level = LEVELS.get(kind, "info")
        self.show(self._line(Event(time=time.time(), kind=kind, message=message, level=level)))

    def emit(self, record: logging.LogRecord) -> None:
        """Print what a logger says, unless it is reported as an event too."""
        if getattr(record, "reported", False):
            return
        level: Level = "error" if record.levelno >= logging.ERROR else "warning"
        text = logging.Formatter("%(message)s").format(record)  # with the traceback, if there is one
        self.show(self._line(Event(time=record.created, kind="error", message=text, level=level)))

    def close(self) -> None:
        """Show nothing more."""
        logging.getLogger().removeHandler(self)
        super().close()


def _json_line(event: Event) -> str:
    return msgspec.json.encode(event).decode()
