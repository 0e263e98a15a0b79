"""Talking to a running switch from a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .failure import FAILED, NO_SWITCH, USAGE, Failure

if TYPE_CHECKING:
    from viaduct.switch.control_client import ControlClient

_EXIT_CODES = {"unreachable": NO_SWITCH, "config": USAGE, "request": USAGE}


@contextmanager
def running_switch(control: str | None) -> Iterator[ControlClient]:
    """A connection to the switch at this control socket; what it refuses ends the command."""
    from viaduct.switch.control_client import ControlClient
    from viaduct.switch.control_wire import ControlError

    try:
        with ControlClient(control) as client:
            yield client
    except ControlError as error:
        raise Failure(str(error), _EXIT_CODES.get(error.code, FAILED)) from error
