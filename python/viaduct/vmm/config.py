"""What a machine is made of, as passive data: the command line, a TOML file and programs all end here.

Sizes are written `512M`, devices in a short form that begins with what they are and goes on with options:

    --disk disk.img,ro               a file, read-only
    --nic switch:web,mac=52:54:...   a port of a running switch
    --nic tap:tap0,path=vhost        an interface of the kernel, served by the kernel
    --share /srv/data,tag=data       a directory
    --device my.py:Clock,pio=0x700+8 a device of your own

In TOML the same fields have the same names; a device is a short form or a table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from viaduct.guest.errors import GuestError
from viaduct.guest.mac import parse_mac
from viaduct.switch.config_error import ConfigError
from viaduct.vmm.memory_map import PAGE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
CPUS_MAX = 64
QUEUE_PAIRS_MAX = CPUS_MAX
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

NicPath = Literal["virtio", "vhost", "emulated"]
"""Who serves a card's rings: this process or a vhost-user back-end, the host's kernel, or nobody because there are none
and every register of a real card is emulated."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A device with a short form."""

    argument: ClassVar[str]
    """The field that stands first in it."""
    flags: ClassVar[Mapping[str, str]] = {}
    """Words that are another way to say `field=true`."""
    rest: ClassVar[str | None] = None
    """The field that takes every other word, if there is one."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises `ConfigError` for values that cannot be."""


class DiskConfig(_Part, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A disk: an image file or a block device. `format`: `raw` or `qcow2`. `serial`: what the guest reads as its serial
    number, up to 20 bytes."""

    file: str
    read_only: bool = False
    format: Literal["raw", "qcow2"] | None = None
    serial: str | None = None

    argument: ClassVar[str] = "file"
    flags: ClassVar[Mapping[str, str]] = {"ro": "read_only"}


class NicConfig(_Part, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A network card. `to`: where its frames go: `switch:NAME`, a port of a running `viaduct switch`, made if it does
    not exist; `vhost-user:PATH`, any back-end's socket; `tap:IF`, an interface of the kernel. `path`: who serves it.
    `mac`: the guest's address; None: one made of the host's and the machine's name. `queues`: pairs of queues, of which
    the driver uses as many as it likes."""

    to: str
    path: NicPath = "virtio"
    mac: str | None = None
    queues: int = 1

    argument: ClassVar[str] = "to"

    @property
    def kind(self) -> str:
        """The word before the colon of `to`."""
        return self.to.partition(":")[0]

    @property
    def target(self) -> str:
        """What stands behind it."""
        return self.to.partition(":")[2]

    def check(self) -> None:
        if self.kind not in ("switch", "vhost-user", "tap") or not self.target:
            raise ConfigError(f"{self.to!r}: expected switch:NAME, vhost-user:PATH or tap:INTERFACE", ("to",))
        if self.path == "vhost" and self.kind != "tap":
            raise ConfigError(
                f"the kernel's vhost-net reaches interfaces only: tap:INTERFACE, not {self.to!r}; join the interface "
                "to the switch as a port, or by a bridge",
                ("path",),
            )
        if not 1 <= self.queues <= QUEUE_PAIRS_MAX:
            raise ConfigError(f"{self.queues} queue pairs are not possible: 1 to {QUEUE_PAIRS_MAX}", ("queues",))
        if self.queues > 1 and self.path == "emulated":
            raise ConfigError("the emulated card has one pair of queues; use path=virtio", ("queues",))
        if self.mac is not None:
            try:
                parse_mac(self.mac)
            except GuestError as error:
                raise ConfigError(str(error), ("mac",)) from None


class ShareConfig(_Part, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A directory of the host: in the guest, `mount -t virtiofs TAG /mnt`. `tag`: None: the directory's name."""

    directory: str
    tag: str | None = None

    argument: ClassVar[str] = "directory"


class DeviceConfig(_Part, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A device of the user's own: `name` is `FILE.py:CLASS` or `package.module:CLASS`. A virtio device needs no more.
    One of registers is where `pio` or `mmio` say, `BASE+SIZE` in ports or guest-physical addresses, and interrupts by
    the line `irq`; what is None, its class says. `options` are keyword arguments of the class."""

    name: str
    pio: str | None = None
    mmio: str | None = None
    irq: int | None = None
    options: dict[str, str] = {}

    argument: ClassVar[str] = "name"
    rest: ClassVar[str | None] = "options"

    def check(self) -> None:
        for key, text in (("pio", self.pio), ("mmio", self.mmio)):
            if text is not None:
                with _key(key):
                    parse_range(text)

    @property
    def class_name(self) -> str:
        """The word behind the colon."""
        return self.name.rpartition(":")[2]


class MachineConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One machine. Fields that name files take paths; relative ones start at the current directory, or at that of the
    TOML file.

    `boot`: how the kernel is started (`viaduct.vmm.boot`). `memory`: bytes. `transport`: where virtio devices are found
    by the guest. `transitional`: on PCI, those whose kind is older than virtio 1.0 can be driven as before it as well.
    `port_notify`: on PCI, their notifications are offered at ports first. `interrupts`: `kernel`: all controllers in
    the engine, with a PC's PICs and interval timer; `split`: the local APICs there, the IOAPIC in this process, and
    neither PICs nor timer. `on_reset`: what a guest's own reset does. `console`: `stdio`, `socket:PATH`, `file:PATH` or
    `none`.
    `console_device`: what it is in the guest, /dev/ttyS0 or /dev/hvc0.
    `vsock`: the path by which the host's programs reach the guest's sockets. `gdb`: a TCP port of the loopback
    interface.
    """

    kernel: str
    name: str = ""
    boot: str = "auto"
    initrd: str | None = None
    append: str = ""
    memory: int = 512 << 20
    cpus: int = 1
    disks: tuple[DiskConfig, ...] = ()
    nics: tuple[NicConfig, ...] = ()
    shares: tuple[ShareConfig, ...] = ()
    devices: tuple[DeviceConfig, ...] = ()
    vsock: str | None = None
    rng: bool = True
    balloon: bool = False
    console: str = "stdio"
    console_device: Literal["serial", "virtio"] = "serial"
    transport: Literal["pci", "mmio"] = "pci"
    transitional: bool = False
    port_notify: bool = False
    interrupts: Literal["kernel", "split"] = "kernel"
    engine: Literal["auto", "kvm"] = "auto"
    on_reset: Literal["restart", "stop"] = "restart"
    gdb: int | None = None

    def __post_init__(self) -> None:
        if self.name and not NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name!r}: up to 64 letters, digits, '_', '-' and '.', the first a letter or digit", ("name",)
            )
        if self.memory <= 0 or self.memory % PAGE:
            raise ConfigError(
                f"{self.memory} bytes are not possible: whole pages of {PAGE} bytes, at least one (512M)", ("memory",)
            )
        if not 1 <= self.cpus <= CPUS_MAX:
            raise ConfigError(
                f"{self.cpus} vCPUs are not possible: 1 to {CPUS_MAX}, and no more than this host's KVM can", ("cpus",)
            )
        kind, _, target = self.console.partition(":")
        if self.console not in ("stdio", "none") and not (kind in ("socket", "file") and target):
            raise ConfigError(f"{self.console!r}: expected stdio, socket:PATH, file:PATH or none", ("console",))
        for key in ("transitional", "port_notify"):
            if getattr(self, key) and self.transport != "pci":
                raise ConfigError(f"is about PCI, and transport = {self.transport!r}: leave one of them out", (key,))
        if self.gdb is not None and not 0 <= self.gdb <= 65535:
            raise ConfigError(f"{self.gdb} is no TCP port: 0 to 65535, where 0 takes a free one", ("gdb",))

    @property
    def shares_memory(self) -> bool:
        """Whether another process has to see the machine's memory."""
        return bool(self.shares) or any(nic.path == "virtio" and nic.kind != "tap" for nic in self.nics)


PartT = TypeVar("PartT", bound=_Part)


def parse_size(text: str | int) -> int:
    """Bytes of `512M`, `2G`, `4096`; M means MiB. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d{1,15})\s*([KMG]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is no size: a whole number with K, M or G behind it, such as 512M")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_range(text: str) -> tuple[int, int]:
    """First address and size of `0x700+8`, a range of ports or addresses. Raises `ConfigError`."""
    match = re.fullmatch(r"(0x[0-9a-f]{1,16}|\d{1,19})\+(0x[0-9a-f]{1,16}|\d{1,19})", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is no range: first address and size, such as 0x700+8 or 0xf0000000+0x1000")
    return int(match[1], 0), int(match[2], 0)


def parse_part(struct: type[PartT], text: str) -> PartT:
    """Reads the short form `ARGUMENT[,option[=value]]...`. Raises `ConfigError`."""
    argument, *options = text.split(",")
    fields: dict[str, Any] = {struct.argument: argument}
    if not argument:
        raise ConfigError(f"needs a {struct.argument} first", (struct.argument,))
    known = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for option in options:
        word, equals, value = option.partition("=")
        key = struct.flags.get(word, word).replace("-", "_")
        if key not in known or key == struct.rest:
            if struct.rest is not None and equals and word.isidentifier():
                if word in fields.setdefault(struct.rest, {}):
                    raise ConfigError("stands twice", (word,))
                fields[struct.rest][word] = value
                continue
            allowed = ", ".join([name for name in known if name != struct.argument] + list(struct.flags))
            raise ConfigError(f"unknown option {word!r} (allowed: {allowed})")
        if key in fields:
            raise ConfigError("stands twice", (key,))
        if known[key] is bool:
            if equals and value not in ("true", "false"):
                raise ConfigError(f"expected true or false, found {value!r}", (key,))
            fields[key] = value != "false"
        elif known[key] == int | None and value.isascii() and value.isdigit():
            fields[key] = int(value[:9])
        elif not value:
            raise ConfigError(f"needs a value: {word}=...", (key,))
        elif known[key] is int:
            if not re.fullmatch(r"\d{1,9}", value):
                raise ConfigError(f"expected a whole number, found {value!r}", (key,))
            fields[key] = int(value)
        else:
            fields[key] = value
    return _convert(struct, fields)


def build_machine(data: Mapping[str, Any], directory: Path | None = None, name: str = "") -> MachineConfig:
    """A machine of plain data, as a TOML table gives it; relative paths start at `directory`.

    Raises:
        ConfigError: an unknown key, a wrong type, an impossible value.
    """
    fields = dict(data)
    if name:
        fields["name"] = name
    if "memory" in fields:
        with _key("memory"):
            fields["memory"] = parse_size(fields["memory"])
    for key, struct in (("disks", DiskConfig), ("nics", NicConfig), ("shares", ShareConfig), ("devices", DeviceConfig)):
        parts = fields.get(key, [])
        if not isinstance(parts, list):
            raise ConfigError(f"expected a list, found {parts!r}", (key,))
        with _key(key):
            fields[key] = [parse_part(struct, part) if isinstance(part, str) else part for part in parts]
    return resolve_paths(_convert(MachineConfig, fields), directory)


def resolve_paths(config: MachineConfig, directory: Path | None = None) -> MachineConfig:
    """The same machine with every path absolute."""
    base = directory or Path.cwd()

    def absolute(path: str) -> str:
        return os.path.normpath(base / Path(path).expanduser())

    def module(name: str) -> str:
        file, colon, class_name = name.rpartition(":")
        return f"{absolute(file)}:{class_name}" if colon and file.endswith(".py") else name

    console, colon, target = config.console.partition(":")
    return msgspec.structs.replace(
        config,
        kernel=absolute(config.kernel),
        initrd=absolute(config.initrd) if config.initrd else None,
        disks=tuple(msgspec.structs.replace(disk, file=absolute(disk.file)) for disk in config.disks),
        shares=tuple(msgspec.structs.replace(share, directory=absolute(share.directory)) for share in config.shares),
        devices=tuple(msgspec.structs.replace(device, name=module(device.name)) for device in config.devices),
        nics=tuple(
            msgspec.structs.replace(nic, to=f"vhost-user:{absolute(nic.target)}") if nic.kind == "vhost-user" else nic
            for nic in config.nics
        ),
        console=f"{console}:{absolute(target)}" if colon else config.console,
        vsock=absolute(config.vsock) if config.vsock else None,
    )


class _key:
    """Errors inside are about this key."""

    def __init__(self, *key: str) -> None:
        self.key = key

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ConfigError):
            raise error.within(*self.key) from None


StructT = TypeVar("StructT", bound=msgspec.Struct)


def _convert(struct: type[StructT], fields: Mapping[str, Any]) -> StructT:
    try:
        return msgspec.convert({key: _plain(value) for key, value in fields.items()}, struct, strict=True)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        key = tuple(part for part in place.strip("`").strip(".").split(".") if part)
        if isinstance(own := error.__cause__, ConfigError):
            raise own.within(*key) from None
        raise ConfigError(f"{problem[:1].lower()}{problem[1:]}", key) from None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
