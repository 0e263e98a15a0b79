"""The configuration: what it accepts, and that every refusal says what was found, what is allowed, and where."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viaduct.switch.config import (
    ConfigError,
    NullPort,
    PcapPort,
    PortConfig,
    SwitchConfig,
    TapPort,
    VhostUserPort,
    build_config,
    format_vlans,
    parse_vlans,
)
from viaduct.switch.config_toml import format_config, key_lines, load_config, parse_config
from viaduct.switch.port_text import format_port, parse_named_port, parse_port

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
paths = st.from_regex(r"/[A-Za-z0-9._/ -]{1,80}[a-z]", fullmatch=True)
vlans: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.integers(1, 4094).map(lambda vlan: {"vlan": vlan}),
    st.lists(st.tuples(st.integers(1, 4094), st.integers(0, 50)), min_size=1, max_size=4).map(
        lambda ranges: {"trunk": "+".join(f"{low}-{min(low + more, 4094)}" for low, more in ranges)}
    ),
)


@st.composite
def ports(draw: st.DrawFn) -> PortConfig:
    place = draw(vlans)
    match draw(st.sampled_from(("vhost-user", "tap", "pcap", "null"))):
        case "vhost-user":
            return VhostUserPort(
                path=draw(paths),
                client=draw(st.booleans()),
                queues=draw(st.integers(1, 128)),
                mtu=draw(st.none() | st.integers(68, 65535)),
                **place,
            )
        case "tap":
            return TapPort(ifname=draw(st.from_regex(r"[a-z]{1,15}", fullmatch=True)), **place)
        case "pcap":
            return PcapPort(file=draw(st.none() | paths), out=draw(paths) + ".pcap", **place)
        case _:
            return NullPort(**place)


@st.composite
def configs(draw: st.DrawFn) -> SwitchConfig:
    config = SwitchConfig(
        pollers=tuple(draw(st.sets(st.integers(0, 63), max_size=4))),
        polling=draw(st.sampled_from(("adaptive", "busy", "interrupt"))),
        mac_ageing=draw(st.floats(0.001, 1e6)),
    )
    for name, port in draw(st.dictionaries(names, ports(), max_size=4)).items():
        try:
            config = config.with_port(name, port)
        except ConfigError:
            continue  # uses the same socket or interface as another
    return config


@given(configs())
def test_toml_reads_back_what_it_writes(config: SwitchConfig) -> None:
    assert parse_config(format_config(config), directory=Path("/")) == normalised(config)


@given(ports())
def test_short_form_reads_back_what_it_writes(port: PortConfig) -> None:
    assert parse_port(format_port(port), Path("/")) == parse_port(format_port(parse_port(format_port(port), Path("/"))))


def normalised(config: SwitchConfig) -> SwitchConfig:
    """The same with normal paths: /a//b/ is /a/b."""
    return SwitchConfig(
        ports={name: parse_port(format_port(port), Path("/")) for name, port in config.ports.items()},
        pollers=config.pollers,
        polling=config.polling,
        mac_ageing=config.mac_ageing,
    )


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("vm1=vhost-user:/run/vm1.sock", "vm1", VhostUserPort(path="/run/vm1.sock")),
        (
            "vm1=vhost-user:/run/vm1.sock,client,queues=4,mtu=9000,vlan=10",
            "vm1",
            VhostUserPort(path="/run/vm1.sock", client=True, queues=4, mtu=9000, vlan=10),
        ),
        ("vm1=vhost-user:/run/a.sock,client=false", "vm1", VhostUserPort(path="/run/a.sock")),
        ("vm1=vhost-user:vm1.sock,trunk=30+10-20", "vm1", VhostUserPort(path="/base/vm1.sock", trunk="10-20+30")),
        ("up=tap:tap0,queues=2", "up", TapPort(ifname="tap0", queues=2)),
        ("r=pcap:in.pcap,out=/tmp/out.pcap", "r", PcapPort(file="/base/in.pcap", out="/tmp/out.pcap")),
        ("r=pcap:,out=out.pcap", "r", PcapPort(out="/base/out.pcap")),
        ("hole=null", "hole", NullPort()),
    ],
)
def test_short_form(text: str, name: str, port: PortConfig) -> None:
    assert parse_named_port(text, Path("/base")) == (name, port)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vhost-user:/run/vm1.sock", "needs a name: NAME=KIND:ARG, such as vm1=vhost-user:/run/vm1.sock"),
        ("vm1=vhost-usr:/run/vm1.sock", "unknown kind of port 'vhost-usr'; did you mean 'vhost-user'?"),
        ("vm1=", "unknown kind of port ''"),
        ("vm1=vhost-user:/run/vm1.sock,queus=2", "unknown key 'queus'; did you mean 'queues'?"),
        ("vm1=vhost-user:/run/vm1.sock,queues=two", "queues: expected a whole number, found 'two'"),
        ("vm1=vhost-user:/run/vm1.sock,queues", "queues: needs a value: queues=..."),
        ("vm1=vhost-user:/run/vm1.sock,queues=2,queues=3", "queues: stands twice"),
        ("vm1=vhost-user:/run/vm1.sock,queues=129", "queues 129 is outside 1 to 128"),
        ("vm1=vhost-user:/run/vm1.sock,mtu=67", "mtu 67 is outside 68 to 65535"),
        ("vm1=vhost-user:/run/vm1.sock,client=perhaps", "expected true or false, found 'perhaps'"),
        ("vm1=vhost-user:/run/vm1.sock,vlan=4095", "VLAN 4095 is outside 1 to 4094"),
        ("vm1=vhost-user:/run/vm1.sock,vlan=1,trunk=2", "either access (vlan) or trunk, not both"),
        ("vm1=vhost-user:/run/vm1.sock,trunk=20-10", "the VLAN range 20-10 is backwards; write 10-20"),
        ("vm1=vhost-user:/run/vm1.sock,trunk=10-", "'10-' is not a list of VLANs; write it as 10-20"),
        ("vm1=vhost-user:", "a vhost-user port needs an argument: vhost-user:PATH"),
        ("vm1=vhost-user:/" + "x" * 107, "the socket path has 108 bytes, but the kernel takes at most 107"),
        ("vm 1=null", "'vm 1' cannot name a port"),
        ("-x=null", "'-x' cannot name a port"),
        ("a=null:x", "a null port takes no argument, found 'x'"),
        ("a=tap:much-too-long-name", "cannot name an interface: the kernel takes 1 to 15 bytes"),
        ("a=tap:a/b", "cannot name an interface"),
        ("a=pcap:", "a pcap port needs an argument: pcap:FILE"),
        ("a=pcap:/tmp/x,out=/tmp/x", "would be read and overwritten at once"),
    ],
)
def test_short_form_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_named_port(text)
    assert problem in str(refused.value)
    assert str(refused.value).startswith(f"port {text!r}: ")


def test_longest_socket_path_is_accepted() -> None:
    assert parse_port("vhost-user:/" + "x" * 106)


FILE = """\
# Two guests and a way out.
polling = "busy"
pollers = [2, 3]

[ports.vm1]
kind = "vhost-user"
path = "vm1.sock"
queues = 2

[ports]
up = "tap:tap0,vlan=10"
"""


def test_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text(FILE)
    assert load_config(file) == SwitchConfig(
        ports={
            "vm1": VhostUserPort(path=str(tmp_path / "vm1.sock"), queues=2),
            "up": TapPort(ifname="tap0", vlan=10),
        },
        pollers=(2, 3),
        polling="busy",
    )


@pytest.mark.parametrize(
    ("old", "new", "where", "problem"),
    [
        ("queues = 2", "queus = 2", "8: ports.vm1.queus", "unknown key 'queus'; did you mean 'queues'?"),
        ("queues = 2", 'queues = "2"', "8: ports.vm1.queues", "expected int, got str ('2')"),
        ("queues = 2", "queues = true", "8: ports.vm1.queues", "expected int, got bool (True)"),
        ("queues = 2", "queues = 0", "8: ports.vm1.queues", "queues 0 is outside 1 to 128"),
        ("vhost-user", "vhost_user", "6: ports.vm1.kind", "did you mean 'vhost-user'?"),
        ("kind =", "knd =", "5: ports.vm1", "needs a key 'kind' (found 'knd')"),
        ('path = "vm1.sock"', "", "5: ports.vm1", "a vhost-user port needs the key 'path'"),
        ("polling =", "poling =", "2: poling", "unknown key 'poling'; did you mean 'polling'?"),
        ('"busy"', '"bussy"', "2: polling", "unknown value 'bussy'; did you mean 'busy'?"),
        ("[2, 3]", "[2, 2]", "3: pollers", "a CPU stands twice"),
        ("[2, 3]", "[-1]", "3: pollers", "CPU -1 is outside 0 to"),
        ("[ports.vm1]", "[prts.vm1]", "5: prts", "unknown key 'prts'; did you mean 'ports'?"),
        ("[ports.vm1]", '[ports."vm 1"]', "5: ports.vm 1", "'vm 1' cannot name a port"),
        ("tap:tap0,", "tup:tap0,", "11: ports.up.kind", "did you mean 'tap'?"),
        ("vlan=10", "vlan=10000", "11: ports.up.vlan", "VLAN 10000 is outside 1 to 4094"),
        ("tap:tap0,vlan=10", "vhost-user:vm1.sock", "11: ports.up.path", "port 'vm1' uses the socket"),
        ("vm1.sock", "x" * 200 + ".sock", "7: ports.vm1.path", "the kernel takes at most 107"),
        ("[2, 3]", "[2, 3", "5", "no valid TOML"),
        ("[ports]", "[ports.vm1]", "10", "no valid TOML"),
        ("up =", "vm1 =", "11", "no valid TOML"),  # a port name used twice
    ],
)
def test_toml_error_says_file_line_key_and_nearest(
    old: str, new: str, where: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "net.toml"
    text = FILE.replace(old, new, 1)
    assert text != FILE
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert str(refused.value).startswith(f"{file}:{where}: ")
    assert problem in str(refused.value)


def test_the_example_is_valid() -> None:
    example = Path(__file__).parents[3] / "contrib" / "net.toml"
    config = load_config(example)
    assert set(config.ports) == {"vm1", "tenant", "vm2", "record"}
    commented = example.read_text().replace("\n#\n# [ports.up]", "\n[ports.up]")
    for key in ("kind", "ifname", "queues", "trunk"):
        commented = commented.replace(f"\n# {key} =", f"\n{key} =")
    assert parse_config(commented).ports["up"] == TapPort(ifname="tap0", queues=2, trunk="10-20+30")


def test_toml_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read: No such file"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'polling = "\xe4"')
    with pytest.raises(ConfigError, match=r"latin\.toml: is not UTF-8 \(byte 11\)"):
        load_config(tmp_path / "latin.toml")


def test_key_lines_in_every_way_of_writing() -> None:
    text = 'a.b = 1\n"c d" = 2\n[t.\'u v\']\nx = """\ny = 3\n"""\nz = { w = 1 }\n[[l]]\nk = 1\n'
    assert key_lines(text) == {
        ("a",): 1,
        ("a", "b"): 1,
        ("c d",): 2,
        ("t",): 3,
        ("t", "u v"): 3,
        ("t", "u v", "x"): 4,
        ("t", "u v", "z"): 7,
        ("l",): 8,
        ("l", "k"): 9,
    }


def test_port_names_are_unique() -> None:
    config = SwitchConfig().with_port("vm1", NullPort())
    with pytest.raises(ConfigError, match=r"ports\.vm1: a port of that name exists already \(null\)"):
        config.with_port("vm1", NullPort())


def test_port_that_is_not_there() -> None:
    config = SwitchConfig().with_port("vm1", NullPort()).with_port("uplink", NullPort())
    assert list(config.without_port("vm1").ports) == ["uplink"]
    with pytest.raises(ConfigError, match=r"unknown port 'uplnk'; did you mean 'uplink'\? \(allowed: vm1, uplink\)"):
        config.without_port("uplnk")


@pytest.mark.parametrize(
    "port", [VhostUserPort(path="/a"), TapPort(ifname="tap0"), PcapPort(out="/a")], ids=lambda port: port.kind
)
def test_two_ports_cannot_share(port: PortConfig) -> None:
    with pytest.raises(ConfigError, match=r"port 'one' uses the .* already"):
        SwitchConfig().with_port("one", port).with_port("two", port)


def test_plain_data_of_wrong_types() -> None:
    with pytest.raises(ConfigError, match="ports: expected a table of ports, found list"):
        build_config({"ports": []})
    with pytest.raises(ConfigError, match=r"ports\.a: expected a table of settings or text"):
        build_config({"ports": {"a": 3}})


@given(st.lists(st.tuples(st.integers(1, 4094), st.integers(1, 4094)).map(sorted), min_size=1, max_size=8))
def test_vlan_ranges_mean_the_same_set(ranges: list[list[int]]) -> None:
    text = "+".join(f"{low}-{high}" for low, high in ranges)
    merged = parse_vlans(text)
    assert {vlan for low, high in merged for vlan in range(low, high + 1)} == {
        vlan for low, high in ranges for vlan in range(low, high + 1)
    }
    assert all(high + 1 < low for (_, high), (low, _) in pairwise(merged))
    assert parse_vlans(format_vlans(merged)) == merged


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vhost-user:/a,mode=9", "mode: '9' is no mode of a file"),
        ("vhost-user:/a,client,mode=0660", "mode: is given by whoever listens"),
        ("vhost-user:/a,client,group=kvm", "group: is given by whoever listens"),
        ("vhost-user:/a,allow=a b", "allow: 'a b' is no list of users"),
    ],
)
def test_who_may_connect_is_checked(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_port(text)


def test_who_may_connect_is_said_and_repeated() -> None:
    text = "vhost-user:/run/a.sock,mode=0660,group=kvm,allow=libvirt-qemu+:kvm"
    assert format_port(parse_port(text)) == text
