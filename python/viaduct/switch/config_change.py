"""The difference of two configurations: what `Switch.apply` has to do, as data.

A pure function. Removals come first, because what they free (a socket path, an interface) an addition may want.
"""

from __future__ import annotations

import msgspec

from .config import PortConfig, SwitchConfig
from .port_rules import RULES


class RemovePort(msgspec.Struct, frozen=True, tag=True):
    """A port goes."""

    name: str
    port: PortConfig


class ChangePort(msgspec.Struct, frozen=True, tag=True):
    """A port stays, with other settings; `fields` names those that differ (`kind` if it is of another kind)."""

    name: str
    old: PortConfig
    new: PortConfig
    fields: tuple[str, ...]

    @property
    def in_place(self) -> bool:
        """Whether the port's peer need not notice: only VLANs and rules differ. Else it is removed and added."""
        return set(self.fields) <= {"vlan", "trunk", *RULES}


class AddPort(msgspec.Struct, frozen=True, tag=True):
    """A port comes."""

    name: str
    port: PortConfig


class SetOption(msgspec.Struct, frozen=True, tag=True):
    """A setting of the switch itself differs: `pollers`, `polling` or `mac_ageing`."""

    name: str
    old: object
    new: object


Change = RemovePort | ChangePort | AddPort | SetOption


def changes(old: SwitchConfig, new: SwitchConfig) -> list[Change]:
    """What leads from `old` to `new`: removals, changes in place or not, additions, then the switch's own settings."""
    removed: list[Change] = [RemovePort(name, port) for name, port in old.ports.items() if name not in new.ports]
    changed: list[Change] = [
        ChangePort(name, port, new.ports[name], _differing(port, new.ports[name]))
        for name, port in old.ports.items()
        if name in new.ports and new.ports[name] != port
    ]
    added: list[Change] = [AddPort(name, port) for name, port in new.ports.items() if name not in old.ports]
    options: list[Change] = [
        SetOption(name, getattr(old, name), getattr(new, name))
        for name in SwitchConfig.__struct_fields__
        if name != "ports" and getattr(old, name) != getattr(new, name)
    ]
    return removed + changed + added + options


def _differing(old: PortConfig, new: PortConfig) -> tuple[str, ...]:
    if type(old) is not type(new):
        return ("kind",)
    return tuple(name for name in old.__struct_fields__ if getattr(old, name) != getattr(new, name))
