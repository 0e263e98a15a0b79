"""Who may use a UNIX socket: the permissions of its file, and a list of users that the kernel vouches for.

Theory of operation
-------------------
`mode` and `group` are given to the file before anybody can connect: it is bound, changed, and only then listened on.
`allow` is compared with what the kernel says of the process at the other end (SO_PEERCRED and SO_PEERGROUPS, unix(7)),
as it was when it connected, so that a path which others can reach still serves only those it is meant for.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import socket
import struct

import msgspec

from viaduct.vhost_user.errors import SocketPathError

SO_PEERGROUPS = 59
"""asm-generic/socket.h; Python has no name for it."""

_CREDENTIALS = struct.Struct("=iII")
_GROUPS_MAX = 256
"""As many as fit into what `socket.getsockopt` takes; of a process with more, only the first group counts."""

_MODE = re.compile(r"0?[0-7]{3}")
_ALLOWED = re.compile(r"(?P<user>[A-Za-z0-9._-]+)?(?::(?P<group>[A-Za-z0-9._-]+))?")


class Allowed(msgspec.Struct, frozen=True):
    """Processes of user `uid` that have group `gid`; None stands for any."""

    uid: int | None
    gid: int | None

    def __str__(self) -> str:
        user = "any user" if self.uid is None else f"uid {self.uid}"
        return user if self.gid is None else f"{user} in group {self.gid}"


class SocketAccess(msgspec.Struct, frozen=True, kw_only=True):
    """`mode` and `gid` of the socket's file, None to leave them as they are; `allow`: empty to serve whoever comes."""

    mode: int | None = None
    gid: int | None = None
    allow: tuple[Allowed, ...] = ()

    def prepare(self, path: str) -> None:
        """Give a socket's file its mode and group, before anybody can connect.

        Raises:
            SocketPathError: the system does not permit it.
        """
        try:
            if self.gid is not None:
                os.chown(path, -1, self.gid)
            if self.mode is not None:
                os.chmod(path, self.mode)
        except PermissionError as error:
            raise SocketPathError(
                f"cannot give {path} to group {self.gid}: {error.strerror}; user {os.geteuid()} may only give files to "
                "groups that it is in (usermod -aG GROUP USER), unless it has CAP_CHOWN"
            ) from None

    def refusal(self, sock: socket.socket) -> str | None:
        """Why the process at the other end is not served, or None."""
        if not self.allow:
            return None
        pid, uid, groups = credentials(sock)
        if any(each.uid in (None, uid) and (each.gid is None or each.gid in groups) for each in self.allow):
            return None
        allowed = ", ".join(map(str, self.allow))
        return f"pid {pid} has uid {uid} and groups {', '.join(map(str, sorted(groups)))}; allowed: {allowed}"


def peer_process(sock: socket.socket) -> tuple[int, int, int]:
    """Process, user and first group at the other end when it connected (SO_PEERCRED, unix(7))."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid


def credentials(sock: socket.socket) -> tuple[int, int, frozenset[int]]:
    """Process, user and groups, the first of them included, at the other end when it connected."""
    pid, uid, gid = peer_process(sock)
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * _GROUPS_MAX)
    except OSError:  # Linux before 4.13, or more groups than that
        data = b""
    return pid, uid, frozenset((gid, *struct.unpack(f"={len(data) // 4}I", data)))


def check_mode(text: str) -> int:
    """The mode of a socket's file, such as ``0660``. Raises ValueError."""
    if not _MODE.fullmatch(text):
        raise ValueError(f"{text!r} is no mode of a file; three octal digits are, such as 0660")
    return int(text, 8)


def split_allow(text: str) -> list[tuple[str | None, str | None]]:
    """Users and groups of ``libvirt-qemu+1000:kvm+:admin``, as names or numbers. Raises ValueError."""
    found = []
    for part in text.split("+"):
        match = _ALLOWED.fullmatch(part)
        if match is None or not part.strip(":"):
            raise ValueError(
                f"{text!r} is no list of users; write USER, USER:GROUP or :GROUP, names or numbers, with + between them"
            )
        found.append((match["user"], match["group"]))
    return found


def resolve_allow(text: str) -> tuple[Allowed, ...]:
    """What such a list means on this host. Raises ValueError for a name that nobody has."""
    return tuple(
        Allowed(None if user is None else user_number(user), None if group is None else group_number(group))
        for user, group in split_allow(text)
    )


def user_number(name: str) -> int:
    """The number of a user. Raises ValueError if there is none of that name."""
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ValueError(f"this host has no user {name!r} (see: getent passwd)") from None


def group_number(name: str) -> int:
    """The number of a group. Raises ValueError if there is none of that name."""
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ValueError(f"this host has no group {name!r} (see: getent group)") from None


ANYBODY = SocketAccess()
"""Whoever may connect to the file as the process's umask makes it."""
