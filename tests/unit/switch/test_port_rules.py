"""Rules of a port: what their texts mean, what is refused, and that changing them touches nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import viaduct
from viaduct.guest import Guest
from viaduct.switch.config import ConfigError, NullPort, SwitchConfig, TapPort, VhostUserPort, build_config
from viaduct.switch.config_change import ChangePort, changes
from viaduct.switch.config_toml import format_config, parse_config
from viaduct.switch.port_rules import LEARN_LIMIT, STORM_LIMIT, format_quantity, parse_macs, parse_quantity
from viaduct.switch.port_text import change_port, format_port, parse_port
from viaduct.virtio.features import NetFeature

from .test_switch import until

MAC = "52:54:00:00:00:01"


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("1500", 1500), ("100k", 100_000), ("2.5M", 2_500_000), ("1G", 10**9), ("10T", 10**13), (42, 42)],
)
def test_a_quantity_is_a_number_and_a_power_of_a_thousand(text: int | str, value: int) -> None:
    assert parse_quantity(text, "rate") == value


@pytest.mark.parametrize("text", ["", "fast", "-1", "1e9", "1 G", "G", "1.5", "11T", "1Gbit"])
def test_no_quantity(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        NullPort(rate=text)
    assert refused.value.key == ("rate",)


@given(st.integers(0, 10**13))
def test_a_quantity_is_written_as_it_is_read(value: int) -> None:
    assert parse_quantity(format_quantity(value), "rate") == value


def test_the_short_form_says_everything() -> None:
    text = (
        "vhost-user:/run/vm1.sock,rate=1G,pps=100k,rate_out=2500M,pps_out=7,burst=5,storm=500,unknown=1k,macs=16,"
        f"mac={MAC}+52:54:00:00:00:02,spoofcheck,private"
    )
    port = parse_port(text)
    assert (port.rate, port.pps, port.storm, port.macs) == (10**9, 100_000, 500, 16)
    assert port.own_macs == (bytes.fromhex("525400000001"), bytes.fromhex("525400000002"))
    assert parse_port(format_port(port)) == port
    config = SwitchConfig(ports={"vm1": port})
    assert parse_config(format_config(config)) == config


def test_guests_have_limits_by_default_and_others_none() -> None:
    guest, uplink = VhostUserPort(path="/run/vm1.sock"), TapPort(ifname="tap0")
    assert (guest.macs, guest.storm, guest.unknown, guest.rate) == (LEARN_LIMIT, STORM_LIMIT, 0, 0)
    assert (uplink.macs, uplink.storm) == (0, 0)
    assert format_port(guest) == "vhost-user:/run/vm1.sock"
    assert parse_port(format_port(VhostUserPort(path="/run/vm1.sock", macs=0))).macs == 0


@pytest.mark.parametrize("mac", ["", "52:54:00:00:00", "01:00:5e:00:00:01", "00:00:00:00:00:00", "x", f"{MAC}++{MAC}"])
def test_no_address_of_a_station(mac: str) -> None:
    with pytest.raises(ConfigError) as refused:
        NullPort(mac=mac)
    assert refused.value.key == ("mac",)


def test_addresses_are_written_in_one_way() -> None:
    assert NullPort(mac="52-54-00-00-00-0A + 52:54:00:00:00:0a").mac == "52:54:00:00:00:0a"
    assert parse_macs(MAC) == (bytes.fromhex("525400000001"),)


def test_a_check_needs_something_to_check_against() -> None:
    with pytest.raises(ConfigError, match=r"mac=52:54"):
        NullPort(spoofcheck=True)


@pytest.mark.parametrize(("key", "value"), [("burst", 0), ("burst", 20_000), ("rate", 10), ("rate_out", 999)])
def test_what_cannot_be_meant_is_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError) as refused:
        build_config({"ports": {"a": {"kind": "null", key: value}}})
    assert refused.value.key == ("ports", "a", key)


def test_one_network_has_an_address_once() -> None:
    def config(**of_b: object) -> SwitchConfig:
        return build_config({"ports": {"a": f"null,mac={MAC},vlan=10", "b": {"kind": "null", "mac": MAC, **of_b}}})

    assert config(vlan=11).ports["b"].mac == MAC
    assert config(trunk="11-20").ports["b"].mac == MAC
    for overlapping in ({"vlan": 10}, {"trunk": "5-10"}, {}):
        with pytest.raises(ConfigError, match="port 'a' has the address"):
            config(**overlapping)


def test_rules_change_in_place() -> None:
    old = SwitchConfig(ports={"a": NullPort(), "b": NullPort()})
    new = SwitchConfig(ports={"a": NullPort(rate="1G", mac=MAC, spoofcheck=True, private=True), "b": NullPort()})
    (change,) = changes(old, new)
    assert isinstance(change, ChangePort)
    assert change.name == "a"
    assert change.in_place


async def test_rules_change_under_a_connected_guest(tmp_path: Path) -> None:
    one, two = tmp_path / "1.sock", tmp_path / "2.sock"
    mac = "02:00:00:00:00:01"
    config = build_config({"ports": {"one": f"vhost-user:{one}", "two": f"vhost-user:{two}"}})
    async with (
        viaduct.Switch(config) as switch,
        Guest(str(one), ip="10.0.0.1/24", mac=mac) as a,
        Guest(str(two), ip="10.0.0.2/24"),
    ):
        first = await a.ping("10.0.0.2", count=1, wait=30)
        assert first.received == 1
        peers = [port.peer for port in switch.ports()]
        guarded = {"one": f"vhost-user:{one},mac=02:00:00:00:00:99,spoofcheck", "two": f"vhost-user:{two}"}
        await switch.apply(build_config({"ports": guarded}))
        assert {entry.port for entry in switch.macs() if entry.mac == "02:00:00:00:00:99"} == {"one"}
        lost = await a.ping("10.0.0.2", count=3, interval=0.01, wait=0.2)
        assert lost.received == 0

        def spoofed() -> int:
            (statistics,) = [port for port in switch.stats().ports if port.name == "one"]
            return statistics.drops("received").get("spoofed", 0)

        await until(lambda: spoofed() >= 3)
        await switch.apply(build_config({"ports": {**guarded, "one": f"vhost-user:{one},mac={mac},spoofcheck"}}))
        answered = await a.ping("10.0.0.2", count=3, interval=0.01, wait=30)
        assert answered.received == 3
        assert [port.peer for port in switch.ports()] == peers, "nobody was cut off"


async def test_the_address_is_told_to_the_driver(tmp_path: Path) -> None:
    path = tmp_path / "vm.sock"
    async with viaduct.Switch(build_config({"ports": {"vm": f"vhost-user:{path},mac={MAC}"}})) as switch:
        device = switch._ports["vm"].device  # type: ignore[attr-defined]
        assert device.features & NetFeature.MAC
        assert device.read_config(0, 6) == bytes.fromhex("525400000001")


def test_options_are_set_and_taken_back() -> None:
    port = parse_port(f"vhost-user:/run/vm1.sock,queues=2,mac={MAC}")
    changed = change_port(port, ["rate=1G", "spoofcheck", "macs=0"])
    assert changed == parse_port(f"vhost-user:/run/vm1.sock,queues=2,mac={MAC},rate=1G,spoofcheck,macs=0")
    assert change_port(changed, ["rate=", "spoofcheck=", "macs="]) == port
    for wrong, key in (("rat=1G", "rat"), ("rat=", "rat"), ("rate=x", "rate"), ("path=", None), ("mac=", "spoofcheck")):
        with pytest.raises(ConfigError) as refused:
            change_port(changed, [wrong])
        assert refused.value.key == ((key,) if key else ())


@pytest.mark.parametrize(("option", "size", "burst"), [("rate", 4 << 20, 0.01), ("rate_out", 1 << 20, 0.1)])
async def test_a_stream_goes_no_faster_than_its_rate(tmp_path: Path, option: str, size: int, burst: float) -> None:
    """Whether what is too fast waits or is dropped, all of it arrives, and the rate holds over the bytes."""
    megabits = 40
    one, two = tmp_path / "1.sock", tmp_path / "2.sock"
    limited = f"{option}={megabits}M"
    ports = {
        "one": f"vhost-user:{one}" + (f",{limited}" if option == "rate" else ""),
        "two": f"vhost-user:{two}" + (f",{limited}" if option == "rate_out" else ""),
    }
    async with (
        viaduct.Switch(build_config({"ports": ports})) as switch,
        Guest(str(one), ip="10.0.0.1/24") as sender,
        Guest(str(two), ip="10.0.0.2/24") as receiver,
    ):
        receiver.serve()
        stream = await sender.stream("10.0.0.2", bytes=size, patience=60)
        assert (stream.verified, stream.error) == (True, None)
        # The last window is not waited for by all clocks alike.
        assert stream.seconds >= 0.5 * (8 * size / (megabits * 1e6) - burst)
        (statistics,) = [port for port in switch.stats().ports if port.name == "one"]
        if option == "rate":
            assert statistics.rate_waits > 0
            assert statistics.drops() == {}
