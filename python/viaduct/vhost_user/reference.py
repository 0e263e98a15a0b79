"""Writes the protocol table into the documentation, or checks that it is there as the code has it.

    python -m viaduct.vhost_user.reference docs/vhost-user.md [--check]

The table stands between two marker comments; the rest of the page is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from viaduct.vhost_user.protocol import BACK_END_REQUESTS, FRONT_END_REQUESTS, IMPLEMENTED, Legal, Request
from viaduct.virtio.features import DeviceFeature

BEGIN = "<!-- protocol table: written by python -m viaduct.vhost_user.reference -->"
END = "<!-- end of protocol table -->"
SENT = ("BACKEND_IOTLB_MSG", "BACKEND_CONFIG_CHANGE_MSG")
"""Requests of ours."""


def carried_out(request: Request) -> bool:
    """Whether a back-end with a device that supports everything does what `request` asks."""
    gate = request.gate
    missing = (gate.protocol | gate.offered) & ~IMPLEMENTED
    return not (gate.virtio & ~DeviceFeature.ACCESS_PLATFORM or gate.device or missing)


def _reply(request: Request) -> str:
    if request.reply is None:
        return "ack if asked"
    return request.reply.title + (" and file descriptor" if request.reply_fd else "")


def _rows(requests: Iterable[Request], sent_by_us: bool) -> Iterable[str]:
    for request in requests:
        if sent_by_us:
            status = "sent" if request.name in SENT else "not sent"
        else:
            status = "yes" if carried_out(request) else "refused"
        legal = "" if request.legal is Legal.ALWAYS else request.legal.value
        cells = (
            str(request.number),
            f"`{request.name}`",
            f"{request.payload.title} ({request.payload.sizes})" if request.payload.sizes != "0" else "none",
            str(request.fds),
            _reply(request),
            str(request.gate),
            legal or "always",
            status,
        )
        yield f"| {' | '.join(cells)} |"


def table() -> str:
    """The tables of both directions as Markdown."""
    parts = []
    for title, requests, ours in (
        ("From the front-end", FRONT_END_REQUESTS, False),
        ("From the back-end, over the channel of `SET_BACKEND_REQ_FD`", BACK_END_REQUESTS, True),
    ):
        parts.append(f"### {title}\n")
        parts.append("| # | request | payload (bytes) | file descriptors | answer | needs | legal | we |")
        parts.append("|---|---|---|---|---|---|---|---|")
        parts.extend(_rows(requests.values(), ours))
        parts.append("")
    return "\n".join(parts)


def replaced(page: str) -> str:
    """`page` with the table as it is now. Raises ValueError if it has no markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the line {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Writes or checks the page; returns the exit status."""
    check = "--check" in arguments
    (path,) = (Path(argument) for argument in arguments if argument != "--check")
    old = path.read_text()
    new = replaced(old)
    if check:
        if old != new:
            print(f"{path} does not show the protocol table as it is; run: python -m {__spec__.name} {path}")
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
