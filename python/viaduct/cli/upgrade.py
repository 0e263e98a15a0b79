"""`viaduct upgrade`: a new process takes over a running switch."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import Control

if TYPE_CHECKING:
    from viaduct.switch.handover_taking import Predecessor


def upgrade(
    control: Control = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Be the new process, instead of starting it and going away.")
    ] = False,
    log_format: Annotated[
        Literal["text", "json"] | None, typer.Option(help="Log lines for people or programs [default: as before].")
    ] = None,
) -> None:
    """Replace the process of a running switch by a new one, of the version that is installed now.

    The new process takes over sockets, guests' memory, rings, addresses and counters, reads the configuration again,
    and goes on where the old one stopped: guests notice nothing. If it cannot, the old one goes on, and this command
    says why and exits with 1, or with 2 if the configuration is wrong.

    \b
        viaduct upgrade
        viaduct upgrade --control /run/viaduct/control.sock
    """
    from viaduct.switch.control_wire import connecting_path

    path = os.path.abspath(control or connecting_path())
    if foreground:
        from .daemon import take_over

        take_over(path, _let_go_of_stdio, log_format)
    else:
        _in_background(path, log_format)


def _let_go_of_stdio(predecessor: Predecessor) -> None:
    for fd in predecessor.stdio:
        os.close(fd)


def _in_background(path: str, log_format: Literal["text", "json"] | None) -> None:
    """The new process is a child in a session of its own; it says through a pipe how it went."""
    import msgspec

    from .failure import FAILED, Failure

    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        os._exit(_be_the_new_one(path, log_format, writing))
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    if not said:
        raise Failure("the new process died without a word; the old one goes on, and viaduct events tells more")
    found: dict[str, Any] = msgspec.json.decode(said)
    if problem := found.get("problem"):
        raise Failure(problem, found.get("code", FAILED))
    print(f"pid {found['pid']} has taken over from pid {found['before']}; gap {found['gap_ms']:.1f} ms")


def _be_the_new_one(path: str, log_format: Literal["text", "json"] | None, writing: int) -> int:
    """Returns the process's exit code."""
    import msgspec

    from .daemon import take_over
    from .failure import FAILED, Failure

    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)

    def relieved(predecessor: Predecessor) -> None:
        found = {"pid": os.getpid(), "before": predecessor.data.pid, "gap_ms": 1000 * predecessor.gap}
        pipe.write(msgspec.json.encode(found))
        pipe.close()
        for number, fd in enumerate(predecessor.stdio):
            os.dup2(fd, number)
        _let_go_of_stdio(predecessor)

    problem, code = "", 0
    with open(writing, "wb") as pipe:
        try:
            take_over(path, relieved, log_format)
        except Failure as failure:
            problem, code = str(failure), failure.exit_code
        except BaseException as error:
            problem, code = f"the new process failed: {type(error).__name__}: {error}", FAILED
        if problem and pipe.closed:
            print(f"viaduct: {problem}", file=sys.stderr)
        elif problem:
            pipe.write(msgspec.json.encode({"problem": problem, "code": code}))
    return code
