"""What a switch shall be: passive, immutable data.

Theory of operation
-------------------
A `SwitchConfig` says everything that a person may decide about a switch and nothing about how it runs. The command
line (`port_text`), the TOML file (`config_toml`), the control socket and the Python API all build one of these and hand
it to `Switch.apply`, which computes the difference to what runs (`config_change`) and touches only that.

Every struct checks itself when it is made, so that no invalid configuration exists: an impossible value raises
`ConfigError`, which knows the key it is about. The readers of each textual form add where that key stands (file and
line, or the argument). `build_port` and `build_config` make structs from plain mappings, where all forms meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import msgspec

from .config_error import ConfigError as ConfigError
from .port_rules import LEARN_LIMIT, STORM_LIMIT, PortRules, format_mac

PORT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""What a port may be called."""

SOCKET_PATH_MAX = 107
"""Longest UNIX socket path in bytes: `sun_path` holds 108, one of them the closing zero (unix(7))."""

VHOST_USER_QUEUES_MAX = 128
"""Queue pairs: vhost-user numbers a vring with 8 bits (SET_VRING_KICK), so that 256 vrings make 128 pairs."""

TAP_QUEUES_MAX = 256
"""Queue pairs of one tap interface (MAX_TAP_QUEUES in the kernel)."""

MTU_MIN, MTU_MAX = 68, 65535
"""Bounds of the MTU that a driver may be told (virtio 1.2, 5.1.4.1)."""

VLAN_MIN, VLAN_MAX = 1, 4094
"""VLAN identifiers: 0 means priority only and 4095 is reserved (IEEE 802.1Q, 9.6)."""

Polling = Literal["adaptive", "busy", "interrupt"]
"""How pollers wait: spin while packets flow and then sleep, never sleep, or never spin."""


class BasePort(PortRules, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every kind of port has: its rules and its place in the VLANs.

    Neither `vlan` nor `trunk`: frames pass with whatever tag they have, and all VLANs are carried.
    `vlan`: an access port; its frames are untagged and belong to this VLAN.
    `trunk`: a trunk port; only frames tagged with one of these VLANs pass, with their tag. Written `10-20+30`.
    """

    vlan: int | None = None
    trunk: str | None = None

    argument: ClassVar[str | None] = None
    """The field that stands directly after the kind in the short form, `tap:IFNAME`."""

    def __post_init__(self) -> None:
        if self.vlan is not None:
            if self.trunk is not None:
                raise ConfigError("a port is either access (vlan) or trunk, not both; leave one out", ("trunk",))
            _check_range("VLAN", self.vlan, VLAN_MIN, VLAN_MAX, "vlan")
        if self.trunk is not None:
            msgspec.structs.force_setattr(self, "trunk", format_vlans(parse_vlans(self.trunk)))
        self.check_rules()
        self._check()

    def _check(self) -> None:
        """The checks of one kind."""

    @property
    def kind(self) -> str:
        """The word that names this kind: `vhost-user`, `tap`, `pcap` or `null`."""
        return str(self.__struct_config__.tag)

    @property
    def trunk_ranges(self) -> tuple[tuple[int, int], ...]:
        """The VLANs of a trunk port as (first, last), ascending and apart; empty if it is none."""
        return parse_vlans(self.trunk) if self.trunk else ()


class VhostUserPort(BasePort, frozen=True, kw_only=True, tag="vhost-user"):
    """A vhost-user back-end on a UNIX socket, where a virtual machine's network card plugs in.

    `path`: the socket. `client`: connect to it instead of listening on it. `queues`: most queue pairs offered.
    `mtu`: told to the driver (VIRTIO_NET_F_MTU), and longer packets are not sent to it. `mode`, `group`: of the
    socket's file. `allow`: users and groups whose processes are served, `USER[:GROUP]+...`; None: all that can connect.
    """

    path: str
    client: bool = False
    queues: int = 1
    mtu: int | None = None
    mode: str | None = None
    group: str | None = None
    allow: str | None = None
    storm: int | str = STORM_LIMIT
    macs: int | str = LEARN_LIMIT

    argument: ClassVar[str | None] = "path"

    def _check(self) -> None:
        _check_path(self.path, "path")
        size = len(self.path.encode(errors="surrogateescape"))
        if size > SOCKET_PATH_MAX:
            raise ConfigError(
                f"the socket path has {size} bytes, but the kernel takes at most {SOCKET_PATH_MAX} (unix(7)): "
                f"{self.path!r}; use a shorter directory, such as /run/viaduct",
                ("path",),
            )
        _check_range("queues", self.queues, 1, VHOST_USER_QUEUES_MAX, "queues")
        if self.mtu is not None:
            _check_range("mtu", self.mtu, MTU_MIN, MTU_MAX, "mtu")
        self._check_access()

    def _check_access(self) -> None:
        from viaduct.vhost_user.socket_access import check_mode, split_allow

        for key in ("mode", "group"):
            if self.client and getattr(self, key) is not None:
                raise ConfigError("is given by whoever listens; with client, that is the other side", (key,))
        for key, check in (("mode", check_mode), ("allow", split_allow)):
            text = getattr(self, key)
            if text is not None:
                try:
                    check(text)
                except ValueError as error:
                    raise ConfigError(str(error), (key,)) from None


class TapPort(BasePort, frozen=True, kw_only=True, tag="tap"):
    """A network interface of the kernel: created when it does not exist, else opened. `queues`: its queue pairs."""

    ifname: str
    queues: int = 1

    argument: ClassVar[str | None] = "ifname"

    def _check(self) -> None:
        size = len(self.ifname.encode(errors="surrogateescape"))
        if not 1 <= size <= 15 or self.ifname in (".", "..") or re.search(r"[\s/:%]", self.ifname):
            raise ConfigError(
                f"{self.ifname!r} cannot name an interface: "
                "the kernel takes 1 to 15 bytes without spaces, '/', ':' and '%'",
                ("ifname",),
            )
        _check_range("queues", self.queues, 1, TAP_QUEUES_MAX, "queues")


class PcapPort(BasePort, frozen=True, kw_only=True, tag="pcap"):
    """Capture files as a port: the frames of `file` come in once; what the switch sends here is written to `out`."""

    file: str | None = None
    out: str | None = None

    argument: ClassVar[str | None] = "file"

    def _check(self) -> None:
        if self.file == "":
            msgspec.structs.force_setattr(self, "file", None)
        if self.file is None and self.out is None:
            raise ConfigError("needs a capture file to replay, or out=FILE to record into, or both", ("file",))
        for key in ("file", "out"):
            path = getattr(self, key)
            if path is not None:
                _check_path(path, key)
        if self.file is not None and self.file == self.out:
            raise ConfigError(f"would be read and overwritten at once: {self.out!r}; name another file", ("out",))


class NullPort(BasePort, frozen=True, kw_only=True, tag="null"):
    """A port that swallows every frame and sends none."""


class InProcessPort(BasePort, frozen=True, kw_only=True, tag="in-process"):
    """A virtual machine's network card whose machine runs in the switch's own process: made by programs, not by text.

    `queues`: most queue pairs offered. `mtu`: as for a vhost-user port.
    """

    queues: int = 1
    mtu: int | None = None

    def _check(self) -> None:
        _check_range("queues", self.queues, 1, VHOST_USER_QUEUES_MAX, "queues")
        if self.mtu is not None:
            _check_range("mtu", self.mtu, MTU_MIN, MTU_MAX, "mtu")


PortConfig = VhostUserPort | TapPort | PcapPort | NullPort | InProcessPort

PORT_KINDS: dict[str, type[PortConfig]] = {
    str(kind.__struct_config__.tag): kind for kind in (VhostUserPort, TapPort, PcapPort, NullPort)
}
"""Every kind of port that a configuration can name, by the word that names it."""


class SwitchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole switch.

    `pollers`: the CPUs to pin a poller thread to, one thread each; empty means one thread, not pinned.
    `mac_ageing`: seconds after which an address that was not seen again is forgotten.
    """

    ports: dict[str, PortConfig] = {}
    pollers: tuple[int, ...] = ()
    polling: Polling = "adaptive"
    mac_ageing: float = 300.0

    def __post_init__(self) -> None:
        for name in self.ports:
            check_port_name(name)
        _check_shared_resources(self.ports)
        _check_own_macs(self.ports)
        for cpu in self.pollers:
            _check_range("CPU", cpu, 0, 1 << 16, "pollers")
        if len(set(self.pollers)) != len(self.pollers):
            raise ConfigError(f"a CPU stands twice in {list(self.pollers)}; each poller needs its own", ("pollers",))
        if self.polling not in get_args(Polling):
            raise ConfigError(_unknown("value", self.polling, get_args(Polling)), ("polling",))
        if not 0 < self.mac_ageing <= 1e6:
            raise ConfigError(f"{self.mac_ageing} seconds is outside 0 (excluded) to 1000000", ("mac_ageing",))

    def with_port(self, name: str, port: PortConfig) -> SwitchConfig:
        """This configuration and one port more.

        Raises:
            ConfigError: the name is taken or impossible, or another port uses the same socket, interface or file.
        """
        if name in self.ports:
            raise ConfigError(
                f"a port of that name exists already ({self.ports[name].kind}); choose another name, "
                f"or remove it first: viaduct port del {name}",
                ("ports", name),
            )
        return msgspec.structs.replace(self, ports={**self.ports, name: port})

    def without_port(self, name: str) -> SwitchConfig:
        """This configuration without one of its ports.

        Raises:
            ConfigError: there is no such port; the nearest name is given.
        """
        if name not in self.ports:
            raise ConfigError(_unknown("port", name, self.ports), ("ports", name))
        return msgspec.structs.replace(self, ports={key: port for key, port in self.ports.items() if key != name})


def check_port_name(name: str) -> None:
    """Raises ConfigError unless `name` may name a port."""
    if not PORT_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name a port: 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit",
            ("ports", name),
        )


def parse_vlans(text: str) -> tuple[tuple[int, int], ...]:
    """Read `10-20+30` as VLAN ranges, ascending, merged where they touch.

    Raises:
        ConfigError: not of that form, or outside 1 to 4094.
    """
    ranges: list[tuple[int, int]] = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None:
            raise ConfigError(
                f"{text!r} is not a list of VLANs; write it as 10-20, or 10-20+30 for several", ("trunk",)
            )
        first = int(match[1])
        last = int(match[2] or first)
        for identifier in (first, last):
            _check_range("VLAN", identifier, VLAN_MIN, VLAN_MAX, "trunk")
        if first > last:
            raise ConfigError(f"the VLAN range {first}-{last} is backwards; write {last}-{first}", ("trunk",))
        ranges.append((first, last))
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def format_vlans(ranges: Iterable[tuple[int, int]]) -> str:
    """The inverse of `parse_vlans`."""
    return "+".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def build_port(fields: Mapping[str, Any]) -> PortConfig:
    """Make a port of plain data: its `kind` and the fields of that kind.

    Raises:
        ConfigError: unknown kind or key (with the nearest valid one), a key missing, a wrong type or value.
    """
    if "kind" not in fields:
        hint = nearest("kind", fields)
        found = f" (found {hint!r})" if hint else ""
        raise ConfigError(f"needs a key 'kind'{found}, one of {_listing(PORT_KINDS)}")
    kind = fields["kind"]
    if not isinstance(kind, str) or kind not in PORT_KINDS:
        raise ConfigError(_unknown("kind of port", kind, PORT_KINDS), ("kind",))
    made = _build(PORT_KINDS[kind], {key: value for key, value in fields.items() if key != "kind"}, f"a {kind} port")
    assert isinstance(made, PortConfig)
    return made


def build_config(data: Mapping[str, Any], directory: Path | None = None) -> SwitchConfig:
    """Make a whole configuration of plain data, such as a decoded TOML file or JSON message.

    A port is a mapping for `build_port`, or its short form, a string like `vhost-user:/run/vm1.sock,queues=2`.
    Relative paths start at `directory` (default: the current one).

    Raises:
        ConfigError: with the key of what cannot be.
    """
    from .port_text import parse_port, resolve_paths

    plain = dict(data)
    ports = plain.pop("ports", {})
    if not isinstance(ports, Mapping):
        raise ConfigError(f"expected a table of ports, found {_described(ports)}", ("ports",))
    built: dict[str, PortConfig] = {}
    for name, fields in ports.items():
        check_port_name(name)
        try:
            if isinstance(fields, PortConfig):
                built[name] = fields
            elif isinstance(fields, str):
                built[name] = parse_port(fields, directory)
            elif isinstance(fields, Mapping):
                built[name] = resolve_paths(build_port(fields), directory)
            else:
                raise ConfigError(f"expected a table of settings or text like 'tap:tap0', found {_described(fields)}")
        except ConfigError as error:
            raise error.within("ports", name) from None
    made = _build(SwitchConfig, plain, "a switch", extra=("ports",), ports=built)
    assert isinstance(made, SwitchConfig)
    return made


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`, if one is near enough to be meant."""
    from difflib import get_close_matches

    found = get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _build(
    struct: type[msgspec.Struct], fields: Mapping[str, Any], what: str, extra: tuple[str, ...] = (), **given: Any
) -> msgspec.Struct:
    """Make a struct of plain values, field by field, so that an error names its field."""
    known = {field.name: field for field in msgspec.structs.fields(struct) if field.name not in given}
    values: dict[str, Any] = dict(given)
    for key, value in fields.items():
        if key not in known:
            raise ConfigError(f"{_unknown('key', key, (*known, *extra))} for {what}", (key,))
        try:
            values[key] = msgspec.convert(value, known[key].type)
        except msgspec.ValidationError as error:
            if struct is SwitchConfig and key == "polling" and isinstance(value, str):
                raise ConfigError(_unknown("value", value, get_args(Polling)), (key,)) from None
            raise ConfigError(f"{_lowered(str(error))} ({value!r})", (key,)) from None
    for name, field in known.items():
        if field.required and name not in values:
            raise ConfigError(f"{what} needs the key {name!r}")
    return struct(**values)


def _check_shared_resources(ports: Mapping[str, PortConfig]) -> None:
    """No two ports may have the same socket, interface or output file."""
    users: dict[tuple[str, str], str] = {}
    for name, port in ports.items():
        match port:
            case VhostUserPort():
                key, resource = "path", ("socket", port.path)
            case TapPort():
                key, resource = "ifname", ("interface", port.ifname)
            case PcapPort(out=str() as out):
                key, resource = "out", ("file", out)
            case _:
                continue
        first = users.setdefault(resource, name)
        if first != name:
            raise ConfigError(f"port {first!r} uses the {resource[0]} {resource[1]!r} already", ("ports", name, key))


def _check_own_macs(ports: Mapping[str, PortConfig]) -> None:
    """An address belongs to one port of a network: two may have it only if no VLAN has both."""
    owners: dict[bytes, list[str]] = {}
    for name, port in ports.items():
        for mac in port.own_macs:
            for other in owners.setdefault(mac, []):
                if _share_a_vlan(port, ports[other]):
                    raise ConfigError(
                        f"port {other!r} has the address {format_mac(mac)} already; one network can have it only once",
                        ("ports", name, "mac"),
                    )
            owners[mac].append(name)


def _share_a_vlan(one: PortConfig, other: PortConfig) -> bool:
    def ranges(port: PortConfig) -> tuple[tuple[int, int], ...]:
        return ((port.vlan, port.vlan),) if port.vlan is not None else port.trunk_ranges or ((0, VLAN_MAX),)

    return any(a <= d and c <= b for a, b in ranges(one) for c, d in ranges(other))


def _check_range(what: str, value: int, low: int, high: int, key: str) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{what} {value} is outside {low} to {high}", (key,))


def _check_path(path: str, key: str) -> None:
    if not path:
        raise ConfigError("the path is empty", (key,))
    if "\0" in path:
        raise ConfigError(f"a path has no zero bytes: {path!r}", (key,))


def _unknown(what: str, word: object, known: Iterable[str]) -> str:
    words = list(known)
    hint = nearest(word, words) if isinstance(word, str) else None
    meant = f"; did you mean {hint!r}?" if hint else ""
    return f"unknown {what} {word!r}{meant} (allowed: {_listing(words)})"


def _listing(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


def _described(value: object) -> str:
    return f"{type(value).__name__} {value!r}"


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:].replace("`", "")
