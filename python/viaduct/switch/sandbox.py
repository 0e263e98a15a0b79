"""What the process of a switch gives up, and what it says about it.

Theory of operation
-------------------
`enter` is called once, before there are other threads and before the first port. Everything that comes later, ports
added from outside included, works with what is left, so it depends on the mode how much that is:

* `auto`: nothing that a legitimate user of the switch would miss. The powers of root but those for interfaces, and for
  files of other users; writing to the system's own directories, and executing anything outside of them; all TCP but
  the metrics; and all system calls but those that a switch makes. What the kernel does not offer is left out, and said.
* `strict`: besides, files can be seen and written only in the directories that the configuration and
  `--sandbox-path` name, and only those capabilities are kept that the configuration needs. What cannot be given up is
  an error.
* `off`: nothing.

What was given up stays so in programs that this process starts, so a successor (upgrade) finds itself in the sandbox
already: it is told by `INHERITED`, and it looks whether that is true.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from .config import PcapPort, PortConfig, SwitchConfig, TapPort, VhostUserPort

SandboxMode = Literal["auto", "off", "strict"]

INHERITED = "VIADUCT_SANDBOX"
"""Environment variable in which a process in a sandbox tells its successor what it is in."""

SYSTEM_DIRECTORIES = (
    "bin",
    "boot",
    "dev",
    "efi",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "proc",
    "sbin",
    "sys",
    "usr",
)
"""Directories of `/` that belong to the system: nothing of a switch is written there."""

PROGRAMS = ("/bin", "/lib", "/lib32", "/lib64", "/sbin", "/usr")
"""Where programs are that may be executed, besides this interpreter."""

DEVICES = (
    *("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/pts"),
    *("/dev/net", "/dev/shm"),
)

INTERPRETER_READS = ("/etc", "/proc", "/sys/devices/system", "/run/systemd/resolve")
"""What Python and the C library read at any time: users, time zones, processors."""

KEPT_CAPABILITIES = ("CAP_NET_ADMIN", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER")
"""Tap interfaces; the group of a socket; directories, sockets and leftovers of other users."""


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is in. `given_up` for people; `not_given_up`: what could not be, and why.

    `writable`: directories outside of which nothing can be written; none if that is not restricted. `capabilities`:
    those that are left.
    """

    mode: SandboxMode
    given_up: tuple[str, ...] = ()
    not_given_up: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()

    def describe(self) -> str:
        """In one line."""
        if self.mode == "off":
            return "off"
        gave_up = "; ".join(self.given_up)
        return f"{self.mode}: gave up {gave_up}" if gave_up else f"{self.mode}: nothing could be given up"

    def can_write(self, path: str) -> bool:
        """Whether the sandbox lets us write there; the file's permissions may still not."""
        return not self.writable or _is_below(path, self.writable)

    def can_read(self, path: str) -> bool:
        """Whether the sandbox lets us read there."""
        return not self.readable or _is_below(path, self.readable)


class SandboxError(Exception):
    """A strict sandbox cannot be had."""


_active: Sandbox | None = None


def active() -> Sandbox:
    """The sandbox that this process is in."""
    return _active or Sandbox(mode="off")


def enter(
    mode: SandboxMode,
    config: SwitchConfig,
    event_fd: int,
    files: Iterable[str] = (),
    directories: Iterable[str] = (),
    listen: Iterable[int] = (),
    groups: bool = False,
) -> Sandbox:
    """Give up what the switch will not need. Cannot be undone.

    `event_fd`: written when a system call was refused. `files`: sockets and files of the process itself, whose
    directories are needed. `directories`: others that shall stay writable. `listen`: TCP ports. `groups`: files will be
    given to groups, whatever the configuration says.

    Raises:
        SandboxError: the mode is strict and something cannot be given up.
    """
    global _active
    if mode == "off":
        _active = Sandbox(mode="off")
    else:
        _active = _inherited(event_fd) or _enter(mode, config, event_fd, files, directories, listen, groups)
        os.environ[INHERITED] = msgspec.json.encode(_active).decode()
    return _active


def _inherited(event_fd: int) -> Sandbox | None:
    """The sandbox that the process before us left us in, if it is true."""
    from viaduct._core import filter_system_calls

    told = os.environ.get(INHERITED)
    if told is None:
        return None
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if status.get("Seccomp") != "2" or status.get("NoNewPrivs") != "1":
        return None
    try:
        sandbox = msgspec.json.decode(told, type=Sandbox)
    except msgspec.DecodeError:
        return None
    filter_system_calls(event_fd, True)
    return sandbox


def _enter(
    mode: SandboxMode,
    config: SwitchConfig,
    event_fd: int,
    files: Iterable[str],
    directories: Iterable[str],
    listen: Iterable[int],
    groups: bool,
) -> Sandbox:
    from viaduct._core import drop_capabilities, filter_system_calls, restrict_access

    done: list[str] = []
    failed: list[str] = []
    named = sorted({os.path.dirname(path) for path in (*files, *_files(config.ports.values()))} | set(directories))
    strict = mode == "strict"
    writable = named if strict else sorted({*_directories_of_users(), *named})
    readable = [*PROGRAMS, *INTERPRETER_READS, *_interpreter(), *_sources(config.ports.values())] if strict else ["/"]
    keep = [name for name in KEPT_CAPABILITIES if not strict or name in _needed(config.ports.values(), groups)]
    kept: list[str] = []
    enforced = "not at all"
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        failed.append(f"{threads - 1} threads ran already and keep their capabilities and files")
    try:
        kept = drop_capabilities(keep)
        done.append(f"all capabilities but {', '.join(kept)}" if kept else "all capabilities")
    except OSError as error:
        failed.append(f"capabilities: {error}")
    try:
        enforced = restrict_access(readable, [*PROGRAMS, *_interpreter()], [*DEVICES, *writable], list(listen))
    except OSError as error:
        failed.append(f"files: {error}")
    if enforced == "not at all":
        failed.append("files and TCP: this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK, lsm=landlock)")
    else:
        below = ", ".join(named)
        files = f"all files but the system's and those below {below}"
        done.append(files if strict else "writing to system directories")
        if enforced == "fully":
            done.append("TCP")
    if enforced == "partly":
        failed.append("TCP, devices: this kernel's Landlock cannot restrict them (Linux 6.12 can)")
    try:
        filter_system_calls(event_fd, False)
        done.append("system calls that no switch makes")
    except OSError as error:
        failed.append(f"system calls: {error}")
    if strict and failed and enforced != "partly":
        raise SandboxError(f"the strict sandbox cannot be had: {'; '.join(failed)}; --sandbox auto does what it can")
    restricted = enforced != "not at all"
    return Sandbox(
        mode=mode,
        given_up=tuple(done),
        not_given_up=tuple(failed),
        writable=tuple([*writable, *DEVICES]) if restricted else (),
        readable=tuple([*readable, *writable, *DEVICES]) if restricted and strict else (),
        capabilities=tuple(kept),
    )


def explain(config: PortConfig) -> str:
    """Why a port could not be had, as far as the sandbox is to blame, to be appended to the error; else nothing."""
    sandbox = active()
    if sandbox.mode == "off":
        return ""
    why = ""
    if outside := [path for path in _files([config]) if not sandbox.can_write(path)]:
        why = f"does not let it write to {', '.join(outside)}"
    elif outside := [path for path in _read([config]) if not sandbox.can_read(path)]:
        why = f"does not let it read {', '.join(outside)}"
    elif missing := _needed([config], False) - set(sandbox.capabilities) - {"CAP_DAC_OVERRIDE", "CAP_FOWNER"}:
        if os.geteuid() != 0:
            return ""  # it never had any
        why = f"took {', '.join(sorted(missing))} away"
    if not why:
        return ""
    return (
        f"; the switch runs in a sandbox ({sandbox.mode}) that {why}: start it with --sandbox-path DIRECTORY, "
        "with the port in its configuration, or with --sandbox off"
    )


def _directories_of_users() -> list[str]:
    return [f"/{name}" for name in os.listdir("/") if name not in SYSTEM_DIRECTORIES and os.path.isdir(f"/{name}")]


def _interpreter() -> list[str]:
    """Where Python and this package are."""
    return sorted({sys.prefix, sys.base_prefix, *(path for path in map(os.path.abspath, sys.path) if path != "/")})


def _files(ports: Iterable[PortConfig]) -> list[str]:
    """What ports write to."""
    found = []
    for port in ports:
        match port:
            case VhostUserPort(path=path, client=False):
                found.append(path)
            case PcapPort(out=str() as out):
                found.append(out)
    return found


def _read(ports: Iterable[PortConfig]) -> list[str]:
    return [port.file for port in ports if isinstance(port, PcapPort) and port.file is not None]


def _sources(ports: Iterable[PortConfig]) -> list[str]:
    """Directories of what ports read."""
    return [os.path.dirname(path) for path in _read(ports)]


def _needed(ports: Iterable[PortConfig], groups: bool) -> set[str]:
    """The capabilities without which an ordinary user could not have these ports."""
    needed = {"CAP_CHOWN"} if groups else set()
    for port in ports:
        match port:
            case TapPort():
                needed.add("CAP_NET_ADMIN")
            case VhostUserPort(group=str()):
                needed |= {"CAP_CHOWN", "CAP_FOWNER"}
            case VhostUserPort() | PcapPort():
                needed |= {"CAP_DAC_OVERRIDE", "CAP_FOWNER"}
    return needed


def _is_below(path: str, directories: Iterable[str]) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath((real, os.path.realpath(each))) == os.path.realpath(each) for each in directories)
