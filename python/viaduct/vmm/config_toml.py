"""Machines in TOML files: one machine a file for `viaduct run --config`, a switch and many for `viaduct up`.

kernel = "vmlinuz"                 # a machine: the fields of MachineConfig
memory = "1G"
nics = ["switch:web"]

[switch]                           # a net: a switch as `viaduct switch --config` takes it ...
polling = "adaptive"
[machines.web]                     # ... and machines by their names, whose cards plug into it
kernel = "vmlinuz"
nics = ["switch:web"]
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from viaduct.switch.config import SwitchConfig, build_config
from viaduct.switch.config_error import ConfigError
from viaduct.switch.config_toml import key_lines
from viaduct.vmm.config import NAME, MachineConfig, build_machine


class NetConfig(msgspec.Struct, frozen=True):
    """A switch and the machines on it."""

    switch: SwitchConfig
    machines: tuple[MachineConfig, ...]


def load_machine_table(path: str | os.PathLike[str], name: str | None) -> dict[str, Any]:
    """The table of one machine, unchecked: the file's own, or in a net that of the machine `name`. Raises
    `ConfigError`."""
    data, _ = _read(Path(path))
    if not isinstance(machines := data.get("machines"), dict):
        return data
    if name not in machines or not isinstance(machines[name], dict):
        known = ", ".join(machines) or "none"
        raise ConfigError(f"is a net of machines; choose one with --name ({known})", source=str(path))
    return dict(machines[name])


def load_net(path: str | os.PathLike[str]) -> NetConfig:
    """Reads a net. Raises `ConfigError` with file, line and key."""
    file = Path(path)
    data, lines = _read(file)
    directory = file.absolute().parent
    try:
        if unknown := [key for key in data if key not in ("switch", "machines")]:
            raise ConfigError("unknown key (allowed: switch, machines)", (unknown[0],))
        switch = _within("switch", lambda: build_config(data.get("switch", {}), directory))
        machines = []
        for name, table in data.get("machines", {}).items():
            if not NAME.fullmatch(name) or not isinstance(table, dict):
                raise ConfigError(f"{name!r}: a machine is a table [machines.NAME]", ("machines", name))
            made = _within("machines", name, lambda name=name, table=table: build_machine(table, directory, name))
            if made.console == "stdio":
                made = msgspec.structs.replace(made, console="none")
            machines.append(made)
        if not machines:
            raise ConfigError("names no machine; write one as a table [machines.NAME]", ("machines",))
        return NetConfig(switch, tuple(machines))
    except ConfigError as error:
        found = next((lines[error.key[:n]] for n in range(len(error.key), 0, -1) if error.key[:n] in lines), None)
        raise error.at(f"{path}:{found}" if found else str(path)) from None


def _within(*key: Any) -> Any:
    *outer, build = key
    try:
        return build()
    except ConfigError as error:
        raise error.within(*outer) from None


def _read(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        text = file.read_text(encoding="utf-8")
        return tomllib.loads(text), key_lines(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 (byte {error.start})", source=str(file)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", source=str(file)) from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"no valid TOML: {error}", source=f"{file}:{line[1]}" if line else str(file)) from None
