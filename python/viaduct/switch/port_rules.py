"""By what rules one guest is kept from harming the others: the options that every kind of port has for this.

The data path (`viaduct._core.Switch.set_rules`) keeps them; all of them can be changed while frames flow, without the
port's peer noticing anything but their effect.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import msgspec

from .config_error import ConfigError

QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)([kKmMgGtT]?)")
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

QUANTITY_MAX = 10**13
"""More than any interface has, and little enough for the data path to count with."""

BURST_MIN, BURST_MAX = 1, 10_000
"""Bounds of `burst` in milliseconds."""

OUT_BURSTS = 10
"""How many times `burst` may come at once towards a port: what is too much there is lost, which slows TCP down far more
than waiting does."""

LEARN_LIMIT = 1024
"""Addresses that one guest may have unless its port says otherwise: 64 such guests fill the forwarding table."""

STORM_LIMIT = 10_000
"""Broadcasts and multicasts that a guest may send in a second unless its port says otherwise. A guest that looks for a
whole /16 by ARP needs seven seconds for it; one in a loop or under a virus's control costs its neighbours little."""

_QUANTITIES = ("rate", "pps", "rate_out", "pps_out", "storm", "unknown", "macs")


class PortRules(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a port may do, and what it is spared. A quantity of 0 is no limit, and k, M, G or T may stand at its end.

    `rate`, `pps`: bits and frames a second that the port may send. What is too much waits in its own ring.
    `rate_out`, `pps_out`: the same for what is sent to it. What is too much is dropped.
    `burst`: how much may come at once after a pause, as the milliseconds in which the rate would allow it; ten times as
    much of what is sent to the port.
    `storm`: broadcasts and multicasts a second that it may send.
    `unknown`: frames a second that it may send to stations nobody has heard, which go to all ports.
    `macs`: addresses that are learned from it; frames from further ones pass, but answers to them go to all ports.
    `mac`: its own addresses, joined by `+`. No other port can send with them, and they are known without being heard.
    `spoofcheck`: it can send with none but these.
    `private`: it hears the ports that are not private, and they hear it; private ports do not hear one another.
    """

    rate: int | str = 0
    pps: int | str = 0
    rate_out: int | str = 0
    pps_out: int | str = 0
    burst: int = 10
    storm: int | str = 0
    unknown: int | str = 0
    macs: int | str = 0
    mac: str | None = None
    spoofcheck: bool = False
    private: bool = False

    def check_rules(self) -> None:
        """Bring every option into its one form. Raises ConfigError."""
        for key in _QUANTITIES:
            msgspec.structs.force_setattr(self, key, parse_quantity(getattr(self, key), key))
        if not BURST_MIN <= self.burst <= BURST_MAX:
            raise ConfigError(f"{self.burst} milliseconds is outside {BURST_MIN} to {BURST_MAX}", ("burst",))
        for key in ("rate", "rate_out"):
            if 0 < getattr(self, key) < 1000:
                raise ConfigError(
                    f"{getattr(self, key)} bits a second is less than 1000; did you mean {getattr(self, key)}M?", (key,)
                )
        if self.mac is not None:
            msgspec.structs.force_setattr(self, "mac", "+".join(format_mac(mac) for mac in parse_macs(self.mac)))
        elif self.spoofcheck:
            raise ConfigError(
                "there is no address to check against; say which the port has: mac=52:54:00:00:00:01", ("spoofcheck",)
            )

    @property
    def own_macs(self) -> tuple[bytes, ...]:
        """The addresses of `mac`, six bytes each."""
        return parse_macs(self.mac) if self.mac else ()

    def for_data_path(self) -> dict[str, Any]:
        """The rules as `viaduct._core.Switch.set_rules` takes them."""
        microseconds = self.burst * 1000
        return {
            "macs": list(self.own_macs),
            "spoofcheck": self.spoofcheck,
            "private": self.private,
            "learn_limit": min(int(self.macs), 0xFFFFFFFF),
            "rate": (int(self.rate), int(self.pps), microseconds),
            "rate_out": (int(self.rate_out), int(self.pps_out), OUT_BURSTS * microseconds),
            "storm": int(self.storm),
            "unknown": int(self.unknown),
        }


RULES = frozenset(PortRules.__struct_fields__)
"""The names of these options."""


def parse_quantity(value: int | str, key: str) -> int:
    """Read `1G`, `2.5M`, `100k` or a plain number.

    Raises:
        ConfigError: not of that form, no whole number, or too large.
    """
    if isinstance(value, str):
        match = QUANTITY.fullmatch(value.strip())
        if match is None:
            raise ConfigError(f"{value!r} is no quantity; write it as 1500, 100k, 2.5M or 1G; 0: no limit", (key,))
        exact = Decimal(match[1]) * _SUFFIXES[match[2].lower()]
        if exact != int(exact):
            raise ConfigError(f"{value!r} is no whole number", (key,))
        value = int(exact)
    if not 0 <= value <= QUANTITY_MAX:
        raise ConfigError(f"{value} is outside 0 (no limit) to {QUANTITY_MAX}", (key,))
    return value


def format_quantity(value: int) -> str:
    """The shortest text that `parse_quantity` reads as this: `1G`, `1500k`."""
    for suffix, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value and value % factor == 0:
            return f"{value // factor}{suffix}"
    return str(value)


def parse_macs(text: str) -> tuple[bytes, ...]:
    """Read Ethernet addresses joined by `+`, as six bytes each, without repetitions.

    Raises:
        ConfigError: not of that form, a group address, or zero.
    """
    macs: dict[bytes, None] = {}
    for part in text.split("+"):
        if not re.fullmatch(r"\s*[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}\s*", part):
            raise ConfigError(
                f"{part!r} is no Ethernet address; write it as 52:54:00:00:00:01, several joined by '+'", ("mac",)
            )
        mac = bytes.fromhex(re.sub(r"[:\s-]", "", part))
        if mac[0] & 1 or not any(mac):
            raise ConfigError(
                f"{part.strip()} is no station's address: a group has bit 0 of the first byte set (IEEE 802, 8.2.2), "
                "and zero is nobody's",
                ("mac",),
            )
        macs[mac] = None
    return tuple(macs)


def format_mac(mac: bytes) -> str:
    """The usual text of an Ethernet address."""
    return ":".join(f"{byte:02x}" for byte in mac)
