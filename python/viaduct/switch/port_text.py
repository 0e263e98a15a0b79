"""The short form of a port, as the command line has it: `NAME=KIND:ARG[,option[=value]]...`.

    vm1=vhost-user:/run/vm1.sock,queues=2,vlan=10      up=tap:tap0      rec=pcap:in.pcap,out=out.pcap      hole=null

The options are the fields of the kind's struct in `config`; this file only knows the punctuation. A comma cannot
stand in a path here; a TOML file has no such limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from .config import (
    PORT_KINDS,
    BasePort,
    ConfigError,
    PcapPort,
    PortConfig,
    VhostUserPort,
    build_port,
    check_port_name,
    nearest,
)
from .port_rules import RULES, format_quantity

FORMS = "vhost-user:PATH, tap:IFNAME, pcap:FILE or null, each with options: ,queues=2,vlan=10"
"""What a port's text looks like, for messages."""

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


def parse_named_port(text: str, directory: Path | None = None) -> tuple[str, PortConfig]:
    """Read `NAME=KIND:ARG[,option[=value]]...`. Relative paths start at `directory` (default: the current one).

    Raises:
        ConfigError: `text` is not of that form, or its values cannot be.
    """
    name, equals, rest = text.partition("=")
    try:
        if not equals or ":" in name:
            raise ConfigError(
                f"needs a name: NAME=KIND:ARG, such as vm1={text if ':' in name else 'vhost-user:/run/vm1.sock'}"
            )
        check_port_name(name)
        return name, parse_port(rest, directory)
    except ConfigError as error:
        raise ConfigError(
            error.problem, error.key[-1:] if error.key[-1:] != (name,) else (), f"port {text!r}"
        ) from None


def parse_port(text: str, directory: Path | None = None) -> PortConfig:
    """Read `KIND:ARG[,option[=value]]...`. Relative paths start at `directory` (default: the current one).

    Raises:
        ConfigError: unknown kind or option (with the nearest valid one), a missing argument, a wrong value.
    """
    head, *options = text.split(",")
    kind, colon, argument = head.partition(":")
    if kind not in PORT_KINDS:
        hint = nearest(kind, PORT_KINDS)
        meant = f"; did you mean {hint!r}?" if hint else ""
        raise ConfigError(f"unknown kind of port {kind!r}{meant} (allowed: {FORMS})", ("kind",))
    struct = PORT_KINDS[kind]
    fields: dict[str, Any] = {"kind": kind}
    if struct.argument is None:
        if colon:
            raise ConfigError(f"a {kind} port takes no argument, found {argument!r}; write only {kind!r}")
    elif argument:
        fields[struct.argument] = argument
    elif struct is not PcapPort or not options:
        raise ConfigError(f"a {kind} port needs an argument: {kind}:{struct.argument.upper()}", (struct.argument,))
    types = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for option in options:
        key, equals, value = option.partition("=")
        if key in fields:
            raise ConfigError("stands twice", (key,))
        fields[key] = _value(types.get(key), value if equals else None, key)
    return resolve_paths(build_port(fields), directory)


def change_port(port: PortConfig, options: Iterable[str], directory: Path | None = None) -> PortConfig:
    """The port with other `option=value`s; `option=` gives an option its default back.

    Raises:
        ConfigError: unknown option (with the nearest valid one), a wrong value, or one that goes with no other.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(port)}
    fields: dict[str, Any] = msgspec.to_builtins(port)
    for option in options:
        key, equals, value = option.partition("=")
        if equals and not value and key in types:
            fields.pop(key, None)
        else:
            fields[key] = _value(types.get(key), value if equals else None, key)
    return resolve_paths(build_port(fields), directory)


def format_port(port: PortConfig) -> str:
    """The short form of a port, the inverse of `parse_port`."""
    plain = msgspec.to_builtins(port)
    text = port.kind
    if port.argument is not None:
        text += f":{plain.pop(port.argument, '')}"
    for key, value in plain.items():
        if key in RULES and type(value) is int:
            value = format_quantity(value)
        if key != "kind":
            text += f",{key}" if value is True else f",{key}={value}"
    return text


def resolve_paths(port: PortConfig, directory: Path | None = None) -> PortConfig:
    """The same port with every path absolute, `~` resolved, relative ones starting at `directory` or the current one.

    Raises:
        ConfigError: the absolute path is too long for a socket.
    """
    base = directory or Path.cwd()

    def absolute(path: str | None) -> str | None:
        return None if path is None else os.path.normpath(base / Path(path).expanduser())

    match port:
        case VhostUserPort():
            return msgspec.structs.replace(port, path=absolute(port.path))
        case PcapPort():
            return msgspec.structs.replace(port, file=absolute(port.file), out=absolute(port.out))
        case BasePort():
            return port


def _value(kind: Any, text: str | None, key: str) -> Any:
    """An option's text as the type of its field."""
    if kind is bool:
        if text is None or text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise ConfigError(f"expected true or false, found {text!r}", (key,))
    if kind is None:
        return text  # an unknown option, which build_port refuses with the nearest one
    if text is None:
        raise ConfigError(f"needs a value: {key}=...", (key,))
    if kind is int or kind == int | None:
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"expected a whole number, found {text!r}", (key,)) from None
    return text
