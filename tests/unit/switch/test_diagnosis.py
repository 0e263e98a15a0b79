"""Every cause of silence that the doctor knows, produced for real, and told by its name."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from viaduct._core import drop_reasons
from viaduct.switch.config import ConfigError, NullPort, VhostUserPort, build_config
from viaduct.switch.diagnosis import Case, Diagnosis, Look, QueueState, findings
from viaduct.switch.drop_advice import ADVICE
from viaduct.switch.status import (
    Direction,
    Iommu,
    Peer,
    PollerStatistics,
    PortStatistics,
    PortStatus,
    QueueStatistics,
    Statistics,
)
from viaduct.switch.switch import Switch
from viaduct.vhost_user import FrontEnd
from viaduct.vhost_user.errors import FrontEndError

from .test_switch import ALICE, BOB, BROADCAST, ethernet, until, write_pcap

MEMORY = 4 << 20
LOOK = 0.05
"""Seconds between the two looks: nothing here depends on how long it is."""


async def causes(switch: Switch, port: str) -> list[str]:
    return [finding.cause for finding in (await switch.diagnose(port, LOOK)).findings]


async def found(switch: Switch, port: str, cause: str) -> str:
    """The message and remedy of a finding that is there."""
    diagnosis = await switch.diagnose(port, LOOK)
    (finding,) = (finding for finding in diagnosis.findings if finding.cause == cause)
    assert not diagnosis.healthy
    return f"{finding.message} / {finding.remedy}"


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        yield sock


async def test_two_guests_that_talk_are_healthy() -> None:
    async with (
        Switch() as switch,
        switch.guest("alice", ip="10.0.0.1/24") as alice,
        switch.guest("bob", ip="10.0.0.2/24"),
    ):
        assert (await alice.ping("10.0.0.2", count=3, wait=30)).received == 3
        diagnosis = await switch.diagnose("alice", LOOK)
        assert diagnosis.findings == ()
        assert diagnosis.healthy
        assert any("kicks seen" in line for line in diagnosis.seen)


async def test_nobody_has_connected(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock")
        said = await found(switch, "a", "not-connected")
        assert f"we listen on {tmp_path}/a.sock and no front-end is connected since" in said
        assert f"path={tmp_path}/a.sock,reconnect=1" in said
        with connected(tmp_path / "a.sock"):
            await until(lambda: switch.ports()[0].peer is not None)
            assert "not-connected" not in await causes(switch, "a")
        await until(lambda: switch.ports()[0].peer is None)
        assert "the last one left because: the front-end closed" in await found(switch, "a", "not-connected")


async def test_nobody_listens_where_we_connect(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock,client")
        assert f"{tmp_path}/a.sock does not exist" in await found(switch, "a", "not-connected")
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(f"{tmp_path}/a.sock")
        assert "exists, but nobody serves it" in await found(switch, "a", "not-connected")


async def test_whoever_came_was_not_allowed(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock,allow={os.geteuid() + 1}")
        with connected(tmp_path / "a.sock") as sock:
            assert await asyncio.get_running_loop().run_in_executor(None, sock.recv, 1) == b""
        said = await found(switch, "a", "refused")
        assert f"pid {os.getpid()} has uid {os.geteuid()}" in said
        assert "allow=" in said


async def test_two_want_the_same_socket(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock")
        with connected(tmp_path / "a.sock"):
            await until(lambda: switch.ports()[0].peer is not None)
            with connected(tmp_path / "a.sock"):
                await until(lambda: any(event.kind == "peer-refused" for event in switch.history()))
            assert "two front-ends want this socket" in await found(switch, "a", "second-front-end")


async def test_features_are_refused(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock")
        front_end = FrontEnd(f"{tmp_path}/a.sock", memory_size=MEMORY)
        async with front_end:
            with pytest.raises(FrontEndError):
                await front_end.request("SET_FEATURES", (1 << 62,))
        said = await found(switch, "a", "not-connected")
        assert "features that were not offered" in said or "switch off in the front-end" in said


async def test_the_driver_has_not_started(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock")
        with connected(tmp_path / "a.sock"):
            await until(lambda: switch.ports()[0].peer is not None)
            assert "modprobe virtio_net" in await found(switch, "a", "not-started")


async def test_queues_are_disabled(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock")
        async with FrontEnd(f"{tmp_path}/a.sock", memory_size=MEMORY) as front_end:
            for index in range(2):
                await front_end.enable(index, False)
            await until(lambda: not any(state[2] for state in switch.queue_states("a")))
            assert (await causes(switch, "a"))[:2] == ["not-enabled", "not-enabled"]
            assert "SET_VRING_ENABLE" in (await switch.diagnose("a", LOOK)).findings[0].message


async def test_a_driver_that_does_nothing(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock")
        async with FrontEnd(f"{tmp_path}/a.sock", memory_size=MEMORY):
            await until(lambda: all(state[2] for state in switch.queue_states("a")))
            assert "offers no receive buffers (queue 0)" in await found(switch, "a", "no-buffers")
            assert "no kick was seen, no frame waits" in await found(switch, "a", "no-kick")


async def test_a_driver_that_breaks_its_ring(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock")
        async with FrontEnd(f"{tmp_path}/a.sock", memory_size=MEMORY) as front_end:
            await until(lambda: all(state[2] for state in switch.queue_states("a")))
            # More chains than the ring has entries (virtio 1.2, 2.7.13.3).
            transmit = front_end.queues[1]
            os.pwrite(front_end.memory_fd, (0x7000).to_bytes(2, "little"), transmit.driver_addr + 2)
            os.eventfd_write(transmit.kick_fd, 1)
            await until(lambda: switch.ports()[0].link == "broken")
            assert "reset the guest's device" in await found(switch, "a", "broken")


async def test_one_address_at_two_ports() -> None:
    async with (
        Switch() as switch,
        switch.guest("alice", ip="10.0.0.1/24", mac="02:00:00:00:00:07") as alice,
        switch.guest("bob", ip="10.0.0.2/24", mac="02:00:00:00:00:07"),
    ):
        await until(lambda: any(switch.taken_address(name) for name in ("alice", "bob")))
        robbed = next(name for name in ("alice", "bob") if switch.taken_address(name))
        other = {"alice": "bob", "bob": "alice"}[robbed]
        said = await found(switch, robbed, "mac-moved")
        assert f"02:00:00:00:00:07 was heard here and is now behind port {other}" in said
        assert "mac=02:00:00:00:00:07" in said
        assert alice.name == "alice"


async def test_vlans_that_do_not_meet(tmp_path: Path) -> None:
    async with Switch() as switch:
        await switch.add_port("a", f"vhost-user:{tmp_path}/a.sock,vlan=10")
        await switch.add_port("b", f"vhost-user:{tmp_path}/b.sock,vlan=20")
        await switch.add_port("c", "null,trunk=30-40")
        said = await found(switch, "a", "vlan-mismatch")
        assert "no other port is in VLAN 10: b (vlan=20), c (trunk=30-40)" in said


async def test_frames_of_another_vlan(tmp_path: Path) -> None:
    tagged = BROADCAST + ALICE + b"\x81\x00\x00\x05\x88\xb5" + bytes(46)
    async with Switch() as switch:
        await switch.add_port("hole", "null")
        await switch.add_port("player", f"pcap:{write_pcap(tmp_path / 'in.pcap', [tagged])},vlan=10")
        await until(lambda: bool(switch.stats().ports[1].drops()))
        assert "are in a VLAN that the port may not use" in await found(switch, "player", "vlan_denied")


async def test_an_address_that_is_not_its_own(tmp_path: Path) -> None:
    frames = [ethernet(BOB, ALICE, b"")]
    async with Switch() as switch:
        await switch.add_port("hole", "null")
        pcap = write_pcap(tmp_path / "in.pcap", frames)
        await switch.add_port("player", f"pcap:{pcap},mac=52:54:00:00:00:09,spoofcheck")
        await until(lambda: bool(switch.stats().ports[1].drops()))
        assert "none of its own (spoofcheck)" in await found(switch, "player", "spoofed")


async def test_too_many_broadcasts(tmp_path: Path) -> None:
    frames = [ethernet(BROADCAST, ALICE, bytes([n])) for n in range(200)]
    async with Switch() as switch:
        await switch.add_port("hole", "null")
        await switch.add_port("player", f"pcap:{write_pcap(tmp_path / 'in.pcap', frames, 1)},storm=10")
        await until(lambda: switch.stats().ports[1].drops().get("storm", 0) > 100)
        assert "more broadcasts and multicasts than storm= allows" in await found(switch, "player", "storm")


async def test_nobody_to_talk_to(tmp_path: Path) -> None:
    async with Switch() as switch, switch.guest("alice", ip="10.0.0.1/24"):
        assert "there is no other port" in await found(switch, "alice", "alone")
        await switch.add_port("b", f"vhost-user:{tmp_path}/b.sock")
        assert "viaduct doctor b" in await found(switch, "alice", "alone")


async def test_no_port_of_that_name() -> None:
    async with Switch() as switch:
        await switch.add_port("vm1", "null")
        with pytest.raises(ConfigError, match="did you mean 'vm1'"):
            await switch.diagnose("vm2")


def case(**changes: object) -> Case:
    """A port that is up beside another one, for what cannot be produced at will."""
    up = PortStatus(name="a", kind="null", config="null", link="up")
    look = Look(
        status=up,
        others=(msgspec.structs.replace(up, name="b"),),
        statistics=Statistics(time=1.0, pollers=(PollerStatistics(poller=0),)),
        counters=PortStatistics(name="a", kind="null", link="up"),
        queues=(),
    )
    config = build_config({"ports": {"a": "null", "b": "null"}})
    made = Case(
        name="a",
        config=NullPort(),
        configs=config.ports,
        first=look,
        second=msgspec.structs.replace(look, statistics=Statistics(time=2.0, pollers=(PollerStatistics(poller=0),))),
        events=(),
        taken=None,
        now=0.0,
    )
    return msgspec.structs.replace(made, **changes)


def test_a_poller_with_too_much_to_do() -> None:
    made = case()
    assert list(findings(made)) == []
    busy = Statistics(time=2.0, pollers=(PollerStatistics(poller=0, busy_seconds=0.99),))
    (finding,) = findings(case(second=msgspec.structs.replace(made.second, statistics=busy)))
    assert finding.cause == "poller-overloaded"
    assert "99 % of the time" in finding.message


def vhost_case(*queues: QueueState, **counters: int) -> Case:
    """The same for a port with a front-end."""
    made = case()
    config = VhostUserPort(path="/run/a.sock")
    peer = Peer(pid=1, uid=0)
    status = PortStatus(name="a", kind="vhost-user", config="vhost-user:/run/a.sock", link="up", peer=peer)
    look = msgspec.structs.replace(made.second, status=status, queues=queues)
    second = msgspec.structs.replace(look, counters=msgspec.structs.replace(look.counters, **counters))
    return case(config=config, configs={**made.configs, "a": config}, first=look, second=second)


RECEIVES = QueueState(0, True, True, False, False, 256, 256, True, 0)
SENDS = QueueState(1, True, True, False, False, 256, 8, True, 5)


def test_memory_that_became_shorter() -> None:
    faulted = msgspec.structs.replace(SENDS, faulted=True, broken=True)
    (finding,) = findings(vhost_case(RECEIVES, faulted))
    assert finding.cause == "memory-faulted"


def test_a_port_that_has_used_up_its_rate() -> None:
    (finding,) = findings(vhost_case(RECEIVES, SENDS, rate_waits=7))
    assert finding.cause == "rate-limit"
    assert "8 frames of the guest wait" in finding.message
    assert "raise rate= or pps=" in finding.remedy


def test_translations_that_are_refused() -> None:
    made = vhost_case(RECEIVES, msgspec.structs.replace(SENDS, waiting=0))
    queues = (QueueStatistics(queue=0, direction="received", frames=1),)
    first, second = (
        msgspec.structs.replace(
            look,
            counters=msgspec.structs.replace(look.counters, queues=queues),
            status=msgspec.structs.replace(
                look.status, iommu=Iommu(ranges=1, updates=1, invalidations=0, misses=9, refused=refused)
            ),
        )
        for look, refused in ((made.first, 2), (made.second, 9))
    )
    (finding,) = findings(msgspec.structs.replace(made, first=first, second=second))
    assert finding.cause == "iommu-refused"
    assert finding.message.startswith("7 translations")


def test_frames_that_nobody_fetches() -> None:
    (finding,) = findings(vhost_case(RECEIVES, SENDS))
    assert finding.cause == "stuck"


@pytest.mark.parametrize("reason", drop_reasons())
def test_every_reason_for_a_drop_is_explained(reason: str) -> None:
    advice = ADVICE[reason]
    looks = case().second
    direction: Direction = (
        "sent" if reason in ("no_buffers", "too_big", "offload", "io", "rate_limited") else "received"
    )
    counters = PortStatistics(
        name="a", kind="null", link="up", queues=(QueueStatistics(queue=0, direction=direction, drops={reason: 100}),)
    )
    (finding,) = findings(case(second=msgspec.structs.replace(looks, counters=counters)))
    assert finding.cause == reason
    assert advice.meaning in finding.message
    assert finding.remedy == advice.remedy


def test_every_reason_for_a_drop_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "switch.md").read_text()
    missing = [reason for reason in drop_reasons() if f"| `{reason}` |" not in page]
    assert missing == []


def test_a_few_drops_that_happen_everywhere_are_no_finding() -> None:
    queue = QueueStatistics(queue=0, direction="received", frames=1000, drops={"no_destination": 10, "runt": 1})
    counters = PortStatistics(name="a", kind="null", link="up", queues=(queue,))
    made = case()
    first = msgspec.structs.replace(made.first, counters=counters)
    second = msgspec.structs.replace(made.second, counters=counters)
    assert list(findings(case(first=first, second=second))) == []


def test_a_diagnosis_is_data() -> None:
    made = Diagnosis(port="a", findings=tuple(findings(case())), seen=("x",))
    assert msgspec.json.decode(msgspec.json.encode(made), type=Diagnosis) == made
