"""The command above the commands: `viaduct --help`, `--version`, and the loading of what was asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from . import COMMANDS

HELP = """A virtual switch in user space: guests plug in through vhost-user sockets, packets flow.

See it work, with two guests in this process and nothing to install:

    viaduct demo

Run a switch with two ports, each a socket for a virtual machine's network card:

    viaduct switch --port vm1=vhost-user:/tmp/vm1.sock --port vm2=vhost-user:/tmp/vm2.sock

and from another terminal look at it:

    viaduct port list
    viaduct stats --watch
    viaduct capture vm1 -w - | wireshark -k -i -
    viaduct doctor vm1

Exit codes: 0 done, 1 failed or refused, 2 wrong usage, 3 no switch or
machine answers, 128 + N ended by signal N."""


def build(names: list[str]) -> typer.Typer:
    """An application with the commands of these names."""
    app = typer.Typer(
        name="viaduct",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback(help=preformatted(HELP))(_root)
    for name in names:
        module, _, attribute = COMMANDS[name].partition(":")
        target = getattr(import_module(module), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name)
        else:
            app.command(name, help=preformatted(target.__doc__ or ""))(target)
    return app


def preformatted(text: str) -> str:
    r"""Help text whose indented paragraphs keep their lines: click wraps all others, unless `\b` stands above them."""
    from inspect import cleandoc

    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(f"\b\n{part}" if part.startswith("    ") else part for part in paragraphs)


def _version(wanted: bool) -> None:
    if wanted:
        from viaduct import __version__

        print(f"viaduct {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options above all commands act by their callbacks."""
