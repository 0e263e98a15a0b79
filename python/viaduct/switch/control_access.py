"""Who may ask a running switch, and who may change it.

Theory of operation
-------------------
The kernel says who is at the other end of the control socket (SO_PEERCRED, SO_PEERGROUPS, unix(7)). Root and the user
who runs the switch may do everything, and so may members of the group for changes. Members of the group for reading may
ask for what does not show what guests say to one another: counters, ports, events, addresses. The file's mode keeps
everybody else away: 0600 without groups, 0660 with one, and with two, where one file cannot have both, 0666, and who
belongs to neither is told so and hung up on.
"""

from __future__ import annotations

import os
import socket
from typing import Literal

import msgspec

from viaduct.vhost_user.socket_access import SocketAccess, credentials, group_number

from .config import ConfigError

Role = Literal["change", "read"]

READING = frozenset(
    {"about", "config", "port.list", "stats", "stats.watch", "macs", "events", "events.history", "doctor"}
)
"""Methods that change nothing and show no frames."""


class ControlAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Groups, by number, whose members may change the switch, or only read what it says of itself."""

    changers: int | None = None
    readers: int | None = None

    @property
    def groups(self) -> set[int]:
        """The groups that are named."""
        return {group for group in (self.changers, self.readers) if group is not None}

    @property
    def file(self) -> SocketAccess:
        """Mode and group of the socket's file."""
        match [*self.groups]:
            case []:
                return SocketAccess(mode=0o600)
            case [group]:
                return SocketAccess(mode=0o660, gid=group)
            case _:
                return SocketAccess(mode=0o666)

    def role(self, sock: socket.socket) -> tuple[Role | None, str]:
        """What the process at the other end may do, and who it is."""
        pid, uid, groups = credentials(sock)
        who = f"pid {pid}, uid {uid}"
        if uid in (0, os.geteuid()) or self.changers in groups:
            return "change", who
        return ("read" if self.readers in groups else None), who


def resolve_groups(changers: str | None, readers: str | None) -> ControlAccess:
    """What the names of groups mean on this host. Raises ConfigError for one that it does not have."""
    found = []
    for option, name in (("--control-group", changers), ("--control-readers", readers)):
        try:
            found.append(None if name is None else group_number(name))
        except ValueError as error:
            raise ConfigError(str(error), source=option) from None
    return ControlAccess(changers=found[0], readers=found[1])


def why_refused(role: Role | None, method: str, who: str) -> str | None:
    """Why this method is refused, or None."""
    if role == "change" or (role == "read" and method in READING):
        return None
    if role is None:
        return (
            f"{who} may not ask this switch: root and the user who runs it may, and members of the groups of "
            "--control-group and --control-readers"
        )
    return f"{who} may read but not {method}: that takes root, the user who runs the switch, or its --control-group"
