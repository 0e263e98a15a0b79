"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Control = Annotated[
    str | None,
    typer.Option(
        "--control",
        metavar="SOCKET",
        help="The running switch's control socket [default: VIADUCT_CONTROL, or where `viaduct switch` listens].",
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
