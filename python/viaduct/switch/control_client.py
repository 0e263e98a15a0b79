"""The client's side of the control socket: plain blocking calls, so that a command starts fast.

with ControlClient() as switch:
    switch.call("port.add", name="vm3", port={"kind": "vhost-user", "path": "/run/vm3.sock"})
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from .control_wire import CONTROL_VARIABLE, ControlError, Reply, Request, connecting_path


class ControlClient:
    """A connection to a running switch. `path` defaults to where a switch of this user listens.

    Raises:
        ControlError: nobody listens there, or we may not connect (code `unreachable`).
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = str(path or connecting_path())
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(self.path)
        except OSError as error:
            self._socket.close()
            said = "" if path else f", or say where one is: --control SOCKET or {CONTROL_VARIABLE}=SOCKET"
            if isinstance(error, PermissionError):
                raise ControlError(
                    f"the switch at {self.path} does not let this user (uid {os.geteuid()}) connect; "
                    "ask as its user or root, or start it with --control-group or --control-readers",
                    "unreachable",
                ) from None
            reason = (
                "it does not exist" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
            )
            raise ControlError(
                f"no switch answers at {self.path} ({reason}); start one with: viaduct switch{said}", "unreachable"
            ) from None
        self._reader = self._socket.makefile("rb")
        self._last = 0

    def call(self, method: str, **params: Any) -> Any:
        """Ask and wait for the answer.

        Raises:
            ControlError: the switch refused, or hung up.
        """
        return self._ask(method, params).result

    def stream(self, method: str, **params: Any) -> Iterator[Any]:
        """Ask for something that goes on: yields its items until the switch ends. The connection is used up by this.

        Raises:
            ControlError: the switch refused.
        """
        self._ask(method, params)
        while line := self._reader.readline():
            yield _checked(line).item

    def bytes(self, method: str, **params: Any) -> Iterator[bytes]:
        """Ask for something that is answered by bytes, such as a capture. The connection is used up by this.

        Raises:
            ControlError: the switch refused.
        """
        self._ask(method, params)
        while piece := self._reader.read1(1 << 16):
            yield piece

    def close(self) -> None:
        """Hang up."""
        self._reader.close()
        self._socket.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, params: dict[str, Any]) -> Reply:
        self._last += 1
        try:
            self._socket.sendall(msgspec.json.encode(Request(method=method, id=self._last, params=params)) + b"\n")
            line = self._reader.readline()
        except OSError as error:
            raise ControlError(f"the switch at {self.path} hung up: {error.strerror}", "unreachable") from None
        if not line:
            raise ControlError(f"the switch at {self.path} hung up before it answered", "unreachable")
        return _checked(line)


def _checked(line: bytes) -> Reply:
    try:
        reply = msgspec.json.decode(line, type=Reply)
    except msgspec.DecodeError as error:
        raise ControlError(f"what answered is no switch: {error}", "unreachable") from None
    if reply.error is not None:
        raise ControlError(reply.error.message, reply.error.code)
    return reply
