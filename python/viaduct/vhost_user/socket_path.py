"""UNIX sockets by path: checked, listened on, connected to.

A path that cannot work is refused with what to do about it. A socket file that nobody listens on (its process was
killed) is replaced; one that somebody listens on is not. Who listens removes the file when done, if it is still his.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat

from viaduct.vhost_user.device import Peer
from viaduct.vhost_user.errors import SocketPathError
from viaduct.vhost_user.socket_access import ANYBODY, SocketAccess, peer_process
from viaduct.vhost_user.wire import ready

MAX_PATH = 107
"""Bytes: ``sun_path`` holds 108 with the final NUL (unix(7))."""
FIRST_RETRY = 0.05
LAST_RETRY = 1.0
"""Seconds between attempts to serve whoever is there: doubled from the first to the last."""
SLOWEST_LOOK = 0.25
"""Seconds at most between looks whether somebody listens: a link shall be back within a second."""

_BACKLOG = 8


def check_path(path: str) -> None:
    """Raises `SocketPathError` if no socket can have this path."""
    length = len(os.fsencode(path))
    if not length or "\0" in path:
        raise SocketPathError(f"socket path {path!r} is empty or has a NUL in it; give the path of a file")
    if length > MAX_PATH:
        raise SocketPathError(
            f"socket path {path} has {length} bytes; a UNIX socket's path may have {MAX_PATH} (unix(7)): choose a "
            "shorter one, for example in /tmp or /run, or start in its directory and give a relative path"
        )


ACTIVATED: dict[str, socket.socket] = {}
"""Sockets that somebody else listens on for this process (socket activation), by path. Their files stay."""


class Listener:
    """A listening socket and its file."""

    def __init__(self, path: str, access: SocketAccess = ANYBODY, adopted: socket.socket | None = None) -> None:
        """Listens on `path`, as a file with the permissions of `access`; `adopted`: on a socket of another process that
        does so already. Raises `SocketPathError`."""
        check_path(path)
        self.path = path
        adopted = adopted or ACTIVATED.pop(path, None)
        if adopted is None:
            _remove_stale(path)
        self.sock = adopted or _new_socket()
        self.sock.setblocking(False)
        bound = False
        try:
            if adopted is None:
                self.sock.bind(path)
                bound = True
            info = os.stat(path)
            if adopted is None:
                access.prepare(path)
                self.sock.listen(_BACKLOG)
        except (SocketPathError, OSError) as error:
            self.sock.close()
            if bound:
                os.unlink(path)
            if isinstance(error, SocketPathError):
                raise
            raise _explain("listen on", path, error) from error
        self._identity = (info.st_dev, info.st_ino)
        self.owned = adopted is None
        """The file is ours to remove; that of another process is not, before it has ended."""

    async def accept(self) -> socket.socket:
        """The next connection."""
        # The loop's own sock_accept loses the connection, and says so, if it is cancelled at the wrong moment.
        while True:
            try:
                return self.sock.accept()[0]
            except BlockingIOError:
                await ready(self.sock.fileno())

    def close(self) -> None:
        """Stops listening and removes the file, unless somebody else has put his there."""
        self.sock.close()
        if not self.owned:
            return
        try:
            info = os.stat(self.path)
            if (info.st_dev, info.st_ino) == self._identity:
                os.unlink(self.path)
        except FileNotFoundError:
            return


def try_connect(path: str) -> socket.socket:
    """Connects at once. Raises `SocketPathError` for a path that cannot work and `OSError` while nobody listens."""
    check_path(path)
    sock = _new_socket()
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise _explain("connect to", path, error) from error
    return sock


async def connect(path: str) -> socket.socket:
    """Connects as soon as somebody listens: tries after 0.05 s, then ever more slowly up to four times a second.

    Raises `SocketPathError` for a path that cannot work.
    """
    delay = FIRST_RETRY
    while True:
        try:
            return try_connect(path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            await asyncio.sleep(delay)
            delay = min(2 * delay, SLOWEST_LOOK)


def peer_of(sock: socket.socket, path: str) -> Peer:
    """Who is at the other end."""
    pid, uid, gid = peer_process(sock)
    return Peer(pid=pid, uid=uid, path=path, gid=gid)


def _new_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    return sock


def _remove_stale(path: str) -> None:
    """Removes a socket file that nobody listens on. Raises `SocketPathError` if the path is taken."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # Absent, or bind() finds out what is wrong.
    if not stat.S_ISSOCK(mode):
        raise SocketPathError(f"{path} exists and is no socket; remove it or choose another path")
    try:
        try_connect(path).close()
    except ConnectionRefusedError:
        try:
            os.unlink(path)
        except OSError as error:
            raise _explain("replace the stale socket", path, error) from error
        return
    except FileNotFoundError:
        return
    except BlockingIOError:
        pass
    raise SocketPathError(
        f"{path} is in use: a process listens on it (see: ss -xlp src {path}); stop it or choose another path"
    )


def _explain(what: str, path: str, error: OSError) -> SocketPathError:
    directory = os.path.dirname(path) or "."
    match error.errno:
        case errno.ENOENT:
            hint = f"the directory {directory} does not exist (mkdir -p {directory})"
        case errno.ENOTDIR:
            hint = f"{directory} is no directory"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            hint = (
                f"user {os.geteuid()} may not write there ({error.strerror}); change the permissions of {directory} "
                f"and {os.path.basename(path)}, or choose a path in a directory of yours, for example $XDG_RUNTIME_DIR"
            )
        case errno.EADDRINUSE:
            hint = "somebody has just taken the path; choose another one"
        case errno.EPROTOTYPE:
            hint = "what listens there is no stream socket; give the path of a vhost-user socket"
        case _:
            hint = error.strerror or str(error)
    return SocketPathError(f"cannot {what} {path}: {hint}")
