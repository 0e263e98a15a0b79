"""`viaduct capture`: a port's frames as a pcapng file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .options import Control


def capture(
    port: Annotated[str, typer.Argument(metavar="PORT", help="The port to listen on.")],
    file: Annotated[str, typer.Option("--write", "-w", metavar="FILE", help="Where to; - is standard output.")] = "-",
    count: Annotated[int | None, typer.Option("--count", "-c", metavar="N", help="End after N frames.", min=1)] = None,
    control: Control = None,
) -> None:
    """Write the frames of a port as pcapng.

    Both directions, until Ctrl-C. The guests do not notice.

    \b
        viaduct capture vm1 -w - | wireshark -k -i -
        viaduct capture vm1 -w vm1.pcapng --count 1000
        viaduct capture vm1 | tshark -r -
    """
    from .asking import running_switch
    from .failure import FAILED, USAGE, Failure

    if file == "-" and sys.stdout.isatty():
        raise Failure(
            "a capture is binary and standard output is a terminal; write to a file (-w FILE) "
            f"or pipe it: viaduct capture {port} -w - | tshark -r -",
            USAGE,
        )
    with running_switch(control) as switch:
        pieces = switch.bytes("capture", port=port, **({"count": count} if count else {}))
        try:
            # Unbuffered, so that a viewer at the other end of a pipe sees each frame at once.
            with open(sys.stdout.fileno() if file == "-" else file, "wb", buffering=0, closefd=file != "-") as out:
                for piece in pieces:
                    _write_all(out.fileno(), piece)
        except KeyboardInterrupt:
            pass  # the usual way to end a capture
        except BrokenPipeError:
            pass  # the viewer was closed
        except OSError as error:
            raise Failure(f"cannot write the capture to {file}: {error.strerror}", FAILED) from error


def _write_all(descriptor: int, piece: bytes) -> None:
    import os

    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]
