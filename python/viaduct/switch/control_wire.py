"""The language of the control socket, spoken by `control` (the switch) and `control_client`.

Theory of operation
-------------------
A UNIX stream socket carries JSON, one object a line. A request has an `id`, a `method` and its `params`:

    {"id": 1, "method": "port.del", "params": {"name": "vm3"}}

The reply repeats the `id` and has either a `result` or an `error`, a `code` for programs and a `message` for
people. Requests of one connection are answered in order.

Two kinds of request go on: a *stream* (`events`, `stats.watch`) is answered by `{"id": 1, "item": ...}` lines until the
client hangs up, and `capture` by one reply, after which the switch sends nothing but the bytes of a pcapng file. After
the reply to `hand-over` the connection is a `handover_channel`.

Who may connect, ask and change is said in `control_access`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import msgspec

LINE_MAX = 1 << 20
"""Longest line accepted, in bytes: a configuration of some thousand ports fits."""

HAND_OVER = "hand-over"
"""The request of a new switch process that wants to take over; its language is in `handover_format`."""

SYSTEM_PATH = Path("/run/viaduct/control.sock")
"""Where root's switch, or that of a service, listens."""

CONTROL_VARIABLE = "VIADUCT_CONTROL"
"""Environment variable with the path of the control socket, for those who do not want to say `--control` each time."""


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client asks. `id` is the client's own and comes back with the answer."""

    method: str
    id: int = 0
    params: dict[str, Any] = {}


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request was refused. `code`: `denied` (who asks may not), `config`, `method`, `request` or `failed`."""

    code: str
    message: str


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An answer: exactly one of `result`, `item` (of a stream) and `error` is meant; a missing `result` is null."""

    id: int
    result: Any = None
    item: Any = None
    error: Problem | None = None


class ControlError(Exception):
    """The switch refused a request, or none answers. `code` as in `Problem`, or `unreachable`."""

    def __init__(self, message: str, code: str = "failed") -> None:
        super().__init__(message)
        self.code = code


def candidate_paths() -> list[Path]:
    """Where the control socket may be when no `--control` says, the preferred place first."""
    if named := os.environ.get(CONTROL_VARIABLE):
        return [Path(named)]
    places = []
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        places.append(Path(runtime) / "viaduct" / "control.sock")
    if os.geteuid() == 0:
        places.append(SYSTEM_PATH)
    places.append(Path(f"/tmp/viaduct-{os.geteuid()}/control.sock"))
    return places


def listening_path() -> Path:
    """Where a switch listens when nobody says: the first place whose directory is ours alone, made if it is missing.

    Raises:
        OSError: no place is possible; the last reason is given.
    """
    if os.environ.get(CONTROL_VARIABLE):
        return candidate_paths()[0]
    refused: OSError | None = None
    for path in candidate_paths():
        try:
            _make_private_directory(path.parent)
        except OSError as error:
            refused = error
        else:
            return path
    assert refused is not None
    raise refused


def connecting_path() -> Path:
    """Where a client looks when nobody says: the first place where something is, else the preferred one."""
    places = candidate_paths()
    return next((path for path in (*places, SYSTEM_PATH) if os.path.exists(path)), places[0])


def _make_private_directory(directory: Path) -> None:
    """Make a directory with mode 0700, or see that the one that is there is nobody else's to write to."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = directory.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "is not a directory of this user alone", str(directory))
