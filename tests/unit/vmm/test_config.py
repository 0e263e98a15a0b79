"""A machine's configuration, from text and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from viaduct.switch.config_error import ConfigError
from viaduct.vmm import nic
from viaduct.vmm.config import DiskConfig, NicConfig, build_machine, parse_part, parse_size
from viaduct.vmm.config_toml import load_machine_table, load_net


def test_sizes() -> None:
    assert parse_size("512M") == 512 << 20
    assert parse_size("2G") == 2 << 30
    assert parse_size(4096) == 4096
    for bad in ("", "M", "-1M", "1.5G", "0x10", "9" * 20):
        with pytest.raises(ConfigError, match="no size"):
            parse_size(bad)


def test_short_forms() -> None:
    assert parse_part(DiskConfig, "a.img,ro") == DiskConfig(file="a.img", read_only=True)
    assert parse_part(DiskConfig, "a.img,format=qcow2,serial=x") == DiskConfig(file="a.img", format="qcow2", serial="x")
    card = parse_part(NicConfig, "tap:tap0,path=vhost,mac=52:54:00:00:00:01")
    assert parse_part(NicConfig, "switch:a,queues=4").queues == 4
    assert (card.kind, card.target, card.path) == ("tap", "tap0", "vhost")


def test_relative_paths_start_where_the_file_is(tmp_path: Path) -> None:
    machine = build_machine(
        {"kernel": "k", "disks": ["d.img"], "nics": ["vhost-user:n.sock", "switch:a"], "console": "file:out"}, tmp_path
    )
    assert machine.kernel == str(tmp_path / "k")
    assert machine.disks[0].file == str(tmp_path / "d.img")
    assert [card.to for card in machine.nics] == [f"vhost-user:{tmp_path}/n.sock", "switch:a"]
    assert machine.console == f"file:{tmp_path}/out"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "kernel"),
        ({"kernel": "k", "memory": "0"}, "memory: 0 bytes"),
        ({"kernel": "k", "memory": "4097"}, "memory: 4097 bytes"),
        ({"kernel": "k", "memory": "lots"}, "memory: 'lots' is no size"),
        ({"kernel": "k", "cpus": 0}, "cpus: 0 vCPUs"),
        ({"kernel": "k", "cpus": 65}, "1 to 64"),
        ({"kernel": "k", "cpus": "4"}, "cpus: expected `int`"),
        ({"kernel": "k", "nics": ["switch:a,path=vhost"]}, "tap:INTERFACE"),
        ({"kernel": "k", "nics": ["switch:a,queues=0"]}, "0 queue pairs"),
        ({"kernel": "k", "nics": ["switch:a,queues=65"]}, "1 to 64"),
        ({"kernel": "k", "nics": ["switch:a,queues=many"]}, "expected a whole number, found 'many'"),
        ({"kernel": "k", "nics": ["switch:a,queues=2,path=emulated"]}, "the emulated card has one pair"),
        ({"kernel": "k", "nics": ["switch:"]}, "expected switch:NAME"),
        ({"kernel": "k", "nics": ["tap:t,mac=1"]}, "no MAC address"),
        ({"kernel": "k", "nics": "switch:a"}, "expected a list"),
        ({"kernel": "k", "disks": ["d,rw"]}, "unknown option 'rw'"),
        ({"kernel": "k", "disks": ["d,ro,ro"]}, "stands twice"),
        ({"kernel": "k", "disks": ["d,format"]}, "needs a value"),
        ({"kernel": "k", "console": "serial"}, "expected stdio"),
        ({"kernel": "k", "name": "a/b"}, "letters, digits"),
        ({"kernel": "k", "gdb": 70000}, "no TCP port"),
        ({"kernel": "k", "interrupts": "none"}, "interrupts: invalid enum value 'none'"),
        ({"kernel": "k", "transport": "mmio", "transitional": True}, "transitional: is about PCI"),
        ({"kernel": "k", "transport": "mmio", "port_notify": True}, "port_notify: is about PCI"),
        ({"kernel": "k", "colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_machine(fields)
    assert said in str(error.value)


def test_a_net_of_machines(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text(
        'switch.ports.up = "null"\n[machines.a]\nkernel = "k"\nmemory = "64M"\n[machines.b]\nkernel = "k"\ncpus = 2\n'
    )
    net = load_net(file)
    assert list(net.switch.ports) == ["up"]
    assert [(machine.name, machine.memory >> 20, machine.cpus) for machine in net.machines] == [
        ("a", 64, 1),
        ("b", 512, 2),
    ]
    assert {machine.console for machine in net.machines} == {"none"}
    assert load_machine_table(file, "b") == {"kernel": "k", "cpus": 2}
    with pytest.raises(ConfigError, match="choose one with --name"):
        load_machine_table(file, None)


def test_errors_in_a_net_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    for text, said in (
        ('[machines.a]\nkernel = "k"\ncpus = 99\n', "net.toml:3: machines.a.cpus: 99 vCPUs"),
        ("[machine.a]\n", "net.toml:1: machine: unknown key"),
        ("", "names no machine"),
        ("a = [", "no valid TOML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as error:
            load_net(file)
        assert said in str(error.value)


def test_addresses_of_cards_stay_the_same_and_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = NicConfig(to="switch:a")
    given = NicConfig(to="switch:a", mac="52:54:00:00:00:01")

    def on_host(identity: str | None) -> list[bytes]:
        file = tmp_path / "machine-id"
        file.unlink(missing_ok=True)
        if identity is not None:
            file.write_text(identity)
        monkeypatch.setattr(nic, "_MACHINE_IDS", (file,))
        return [nic.mac_of(card, machine, index) for machine in ("vm1", "vm2") for index in (0, 1)]

    hosts = [on_host("4a\n"), on_host("4b\n"), on_host(None)]
    assert hosts[0] == on_host("4a\n")
    assert len({mac for host in hosts for mac in host}) == 12, "machines, cards and hosts all tell addresses apart"
    assert all(mac.startswith(b"\x52\x54\x00") for host in hosts for mac in host)
    assert nic.mac_of(given, "vm1", 0) == bytes.fromhex("525400000001")
