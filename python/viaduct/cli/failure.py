"""How a command fails: one line that says who, what, what is allowed and what to do next, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

FAILED = 1
"""The operation failed, or the switch refused it."""
USAGE = 2
"""The arguments or the configuration are wrong; nothing was done."""
NO_SWITCH = 3
"""No switch answers on the control socket."""


class Failure(Exception):
    """Ends the command with a message for the user, without a traceback."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def config_errors() -> Iterator[None]:
    """A wrong configuration inside ends the command with exit code 2."""
    from viaduct.switch.config import ConfigError

    try:
        yield
    except ConfigError as error:
        raise Failure(str(error), USAGE) from error
