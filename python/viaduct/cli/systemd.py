"""What systemd tells a service, and is told by it: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).

A switch says when it is ready, how it is, and that it is alive; sockets that systemd listens on for it are taken by
their paths, whatever they are for: control, metrics or ports.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any

from viaduct.vhost_user.socket_path import ACTIVATED

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

STATUS_INTERVAL = 5.0
"""Seconds between two looks at how the switch is."""


def tell(state: str, patience: float = 5.0) -> bool:
    """Say something to systemd, where it started us: lines of NAME=VALUE. Returns whether it was taken.

    A service manager that does not listen for `patience` seconds misses it: packets do not wait for it.
    """
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.settimeout(patience)
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(state.encode())
            return True
    return False


def adopt_sockets() -> str | None:
    """Take the listening sockets that systemd has for this process, each for whoever will listen on its path.

    Returns the path of the one named `control` (FileDescriptorName=), or of the only one.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    paths = []
    for fd in range(FIRST_FD, FIRST_FD + count):
        sock = socket.socket(fileno=fd)
        os.set_inheritable(fd, False)
        path = sock.getsockname()
        if sock.family != socket.AF_UNIX or not isinstance(path, str) or not path:
            sock.close()
            continue
        ACTIVATED[path] = sock
        paths.append((names[fd - FIRST_FD] if fd - FIRST_FD < len(names) else "", path))
    named = [path for name, path in paths if name == "control"]
    return named[0] if named else paths[0][1] if len(paths) == 1 else None


async def keep_told(switch: Any) -> None:
    """Say how the switch is, whenever that has changed, and that this process still answers; until cancelled."""
    if "NOTIFY_SOCKET" not in os.environ:
        return
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 if _is_for_us("WATCHDOG_PID") else 0.0
    said = ""
    while True:
        ports = switch.ports()
        status = f"STATUS={len(ports)} ports, {sum(port.link == 'up' for port in ports)} up"
        if status != said and tell(status, 0.0):
            said = status
        if watchdog:
            tell("WATCHDOG=1", 0.0)
        await asyncio.sleep(min(watchdog / 2 or STATUS_INTERVAL, STATUS_INTERVAL))


def _is_for_us(name: str) -> bool:
    return os.environ.get(name, str(os.getpid())) == str(os.getpid())
