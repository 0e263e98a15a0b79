"""The difference of two configurations."""

from __future__ import annotations

from viaduct.switch.config import NullPort, SwitchConfig, TapPort, VhostUserPort
from viaduct.switch.config_change import AddPort, ChangePort, RemovePort, SetOption, changes

A = VhostUserPort(path="/a")


def test_nothing_to_do() -> None:
    config = SwitchConfig(ports={"a": A}, pollers=(1,))
    assert changes(config, SwitchConfig(ports={"a": VhostUserPort(path="/a")}, pollers=(1,))) == []


def test_removals_come_first_so_that_a_socket_can_move_to_another_name() -> None:
    assert changes(SwitchConfig(ports={"old": A}), SwitchConfig(ports={"new": A})) == [
        RemovePort("old", A),
        AddPort("new", A),
    ]


def test_changed_fields_are_named() -> None:
    tagged = VhostUserPort(path="/a", vlan=10)
    longer = VhostUserPort(path="/b", vlan=10, queues=2)
    [vlan] = changes(SwitchConfig(ports={"a": A}), SwitchConfig(ports={"a": tagged}))
    assert vlan == ChangePort("a", A, tagged, ("vlan",))
    assert vlan.in_place
    [both] = changes(SwitchConfig(ports={"a": tagged}), SwitchConfig(ports={"a": longer}))
    assert isinstance(both, ChangePort)
    assert set(both.fields) == {"path", "queues"}
    assert not both.in_place


def test_another_kind_is_a_change_of_the_whole_port() -> None:
    [change] = changes(SwitchConfig(ports={"a": NullPort()}), SwitchConfig(ports={"a": TapPort(ifname="t")}))
    assert isinstance(change, ChangePort)
    assert change.fields == ("kind",)
    assert not change.in_place


def test_options_come_last() -> None:
    assert changes(SwitchConfig(), SwitchConfig(ports={"a": A}, polling="busy", mac_ageing=10)) == [
        AddPort("a", A),
        SetOption("polling", "adaptive", "busy"),
        SetOption("mac_ageing", 300.0, 10),
    ]
