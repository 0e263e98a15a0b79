"""The words of `viaduct run` when nothing is wrong with them: read without typer.

To load typer takes a third of the time from the command to the guest's first instruction. So the words that simply say
what they say are read here: `--option value`, `--option=value`, `-o value`, `--flag`. Whatever else there is - a word
that is not known, help, a value that is missing, that begins with a dash or is no number - is left to typer, which
explains it; so there is one place for all explanations, `viaduct.cli.run`, and a test compares the two.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["text", "number", "list", "flag"]

WORDS: dict[str, tuple[str, Kind]] = {
    "--kernel": ("kernel", "text"),
    "-k": ("kernel", "text"),
    "--initrd": ("initrd", "text"),
    "--append": ("append", "text"),
    "--memory": ("memory", "text"),
    "-m": ("memory", "text"),
    "--cpus": ("cpus", "number"),
    "-c": ("cpus", "number"),
    "--disk": ("disks", "list"),
    "--nic": ("nics", "list"),
    "--share": ("shares", "list"),
    "--device": ("devices", "list"),
    "--vsock": ("vsock", "text"),
    "--balloon": ("balloon", "flag"),
    "--console": ("console", "text"),
    "--console-device": ("console_device", "text"),
    "--name": ("name", "text"),
    "--boot": ("boot", "text"),
    "--transport": ("transport", "text"),
    "--transitional": ("transitional", "flag"),
    "--port-notify": ("port_notify", "flag"),
    "--interrupts": ("interrupts", "text"),
    "--engine": ("engine", "text"),
    "--on-reset": ("on_reset", "text"),
    "--gdb": ("gdb", "number"),
    "--config": ("config", "text"),
    "--trace": ("trace", "text"),
    "--json": ("json", "flag"),
}
"""Each option: the field that it fills, and how."""


def read(words: list[str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What the command line says, as `machine_run.run_configured` takes it: fields of the machine, and keyword
    arguments; None: typer has to read it."""
    told: dict[str, Any] = {}
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if name not in WORDS:
            return None
        field, kind = WORDS[name]
        if kind == "flag":
            if equals:
                return None
            told[field] = True
            continue
        if not equals:
            value = next(left, "-")
        if value.startswith("-"):
            return None
        if kind == "list":
            told.setdefault(field, []).append(value)
        elif kind == "text":
            told[field] = value
        elif value.isascii() and value.isdigit():
            told[field] = int(value)
        else:
            return None
    return told, {name: told.pop(name) for name in ("config", "trace", "json") if name in told}
