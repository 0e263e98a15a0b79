"""The configuration as a TOML file: read with exact places for errors, written back.

    polling = "adaptive"

    [ports.vm1]
    kind = "vhost-user"
    path = "vm1.sock"            # relative to this file
    queues = 2

    [ports]
    uplink = "tap:tap0,vlan=10"  # the short form of the command line is understood as well

`tomllib` keeps no positions, so a second, small pass over the lines finds where each key stands. It knows table
headers, dotted and quoted keys and multi-line strings; for a key inside an inline table it gives the line of the key
that holds the table.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from .config import ConfigError, SwitchConfig, build_config

_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*\[\[?\s*({_DOTTED})\s*\]\]?")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=")


def load_config(path: str | os.PathLike[str]) -> SwitchConfig:
    """Read a configuration file.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or says something impossible: file, line, key,
            nearest valid key.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 (byte {error.start})", source=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", source=str(path)) from None
    return parse_config(text, str(path), file.parent.absolute())


def parse_config(text: str, source: str = "configuration", directory: Path | None = None) -> SwitchConfig:
    """Read a configuration from TOML text; `source` names it in errors, relative paths start at `directory`.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem = str(error)
        place = re.search(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)", problem)
        line = place[1] if place and place[1] else str(text.count("\n") + 1)
        problem = problem[: place.start()] if place else problem
        raise ConfigError(f"no valid TOML: {problem[:1].lower()}{problem[1:]}", source=f"{source}:{line}") from None
    lines = key_lines(text)
    try:
        return build_config(data, directory)
    except ConfigError as error:
        found = next((lines[error.key[:n]] for n in range(len(error.key), 0, -1) if error.key[:n] in lines), None)
        raise error.at(f"{source}:{found}" if found else source) from None


def format_config(config: SwitchConfig) -> str:
    """The configuration as TOML text, which `parse_config` reads back to the same."""
    plain = msgspec.to_builtins(config)
    ports = plain.pop("ports")
    out = [f"{key} = {_literal(value)}" for key, value in plain.items()]
    for name, port in ports.items():
        out += ["", f"[ports.{_name(name)}]", *(f"{key} = {_literal(value)}" for key, value in port.items())]
    return "\n".join(out) + "\n"


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Where each key of a TOML text stands: its path and its line, counted from 1. The first mention wins."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    closing: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if closing is not None:
            if closing in line:
                closing = None
            continue
        if header := _HEADER.match(line):
            table = _path(header[1])
            path = table
        elif assignment := _ASSIGNMENT.match(line):
            path = (*table, *_path(assignment[1]))
        else:
            path = ()
        for depth in range(1, len(path) + 1):
            found.setdefault(path[:depth], number)
        for quotes in ('"""', "'''"):
            if line.count(quotes) % 2:
                closing = quotes
                break
    return found


def _path(dotted: str) -> tuple[str, ...]:
    return tuple(_bare(part) for part in re.findall(_KEY, dotted))


def _bare(key: str) -> str:
    if key.startswith('"'):
        return str(tomllib.loads(f"k = {key}")["k"])
    return key.strip("'")


def _name(name: str) -> str:
    return _literal(name) if "." in name else name


def _literal(value: Any) -> str:
    # JSON's strings, numbers, booleans and arrays are TOML's as well, once control characters are escaped as JSON does.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
