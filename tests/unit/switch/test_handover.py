"""A switch handed over inside one process: what the messages carry, and what stops them."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
from vhost_user.stand_ins import until
from vhost_user.wire_client import ACK, HEADER, NEED_REPLY, VERSION, Guest, u64

from viaduct import Switch
from viaduct.switch.config import SwitchConfig, TapPort, VhostUserPort
from viaduct.switch.control import ControlServer
from viaduct.switch.control_wire import ControlError
from viaduct.switch.handover_channel import HandoverChannel, HandoverError
from viaduct.switch.handover_format import FORMATS, Failed, PortData, Prepared, Sources, decode, encode
from viaduct.switch.handover_giving import Giver
from viaduct.switch.handover_taking import Predecessor
from viaduct.vhost_user.handover import Fds


@pytest.mark.parametrize("count", [0, 1, 250, 251, 900])
async def test_descriptors_arrive_in_their_order(count: int) -> None:
    ends = socket.socketpair()
    here, there = (HandoverChannel(end) for end in ends)
    pipes = [os.memfd_create(f"{number}") for number in range(count)]
    for number, fd in enumerate(pipes):
        os.ftruncate(fd, number)
    sending = asyncio.create_task(here.send(PortData(name="x" * 900, taps=list(range(count))), Fds(list(pipes))))
    message, fds = await there.receive(30)
    await sending
    assert isinstance(message, PortData)
    assert [os.fstat(fds.need(place)).st_size for place in message.taps] == list(range(count))
    with pytest.raises(ValueError, match="taken twice"):
        fds.need(count - 1)
    for fd in pipes:
        os.close(fd)
    here.close()
    there.close()


async def test_what_ends_a_conversation() -> None:
    ends = socket.socketpair()
    here, there = (HandoverChannel(end) for end in ends)
    await here.send(Failed("the moon is full"))
    with pytest.raises(HandoverError, match="the moon is full"):
        await there.receive(30)
    with pytest.raises(HandoverError, match=r"said nothing for 0\.01 s"):
        await there.receive(0.01)
    ends[0].send(b"\x05\0\0\0\0\0\0\0hello")
    with pytest.raises(HandoverError, match="no message"):
        await there.receive(30)
    ends[0].send(b"\xff\xff\xff\xff\0\0\0\0")
    with pytest.raises(HandoverError, match="4294967295 bytes"):
        await there.receive(30)
    here.close()
    with pytest.raises(HandoverError, match="has gone"):
        await there.receive(30)
    with pytest.raises(HandoverError, match="has gone"):
        await there.send(Prepared())
    there.close()


def test_a_field_that_a_reader_does_not_know_is_no_error() -> None:
    assert decode(encode(Prepared())[:-1] + b',"colour":"blue"}') == Prepared()


async def test_a_format_that_nobody_knows(tmp_path: Path) -> None:
    async with Switch() as switch:
        giver = Giver(switch, Sources(), SwitchConfig, lambda pid, gap: None)
        for formats in ([99], 99, None):
            ours, theirs = socket.socketpair()
            there = HandoverChannel(theirs)
            with pytest.raises(HandoverError, match=r"this one writes \[1\]; restart the switch instead"):
                await giver.give({"formats": formats, "version": "9.9"}, ours, 0, str(tmp_path / "c"))
            assert switch.history()[-1].kind == "upgrade-failed"
            with pytest.raises(HandoverError, match="the new process"):
                await there.receive(30)  # it hears why
            there.close()


async def test_a_switch_of_another_program_is_not_handed_over(tmp_path: Path) -> None:
    async with Switch() as switch, ControlServer(switch, tmp_path / "c", lambda: None):
        with pytest.raises(ControlError, match="part of another program"):
            await Predecessor.find(str(tmp_path / "c"), lambda _: None)


async def test_connections_are_taken_over_in_the_middle_of_a_message(tmp_path: Path) -> None:
    path = tmp_path / "one.sock"
    handed_over = asyncio.Event()
    old = Switch(SwitchConfig(ports={"one": VhostUserPort(path=str(path)), "two": VhostUserPort(path=f"{path}2")}))
    async with old:
        giver = Giver(old, Sources(), lambda: old.config, lambda pid, gap: handed_over.set())
        async with ControlServer(old, tmp_path / "c", lambda: None, giver):
            guest = Guest(str(path))
            await guest.negotiate()
            await guest.share()
            await guest.start()
            features = HEADER.pack(2, VERSION | NEED_REPLY, 8) + u64(1 << 30 | 1 << 32)
            guest.raw(features[:15])
            predecessor = await Predecessor.find(str(tmp_path / "c"), lambda _: None)
            async with Switch() as new:
                await predecessor.prepare(new, SwitchConfig())
                await predecessor.relieve(new)
                await handed_over.wait()
                # What the old process would do by ending: from here on the files are the new one's.
                for port in old.members.values():
                    backend = port.backend  # type: ignore[attr-defined]
                    backend.listener.owned = False
                assert new.config == old.config
                assert [event.sequence for event in new.history()] == list(range(1, len(new.history()) + 1))
                guest.raw(features[15:])
                reply = await guest.receive()
                assert (reply.request, reply.u64) == (2, ACK)
                # The ring runs: the answer says where it stands.
                assert (await guest.ask(11, bytes(8))).payload == bytes(8)
                for name in ("one.sock", "one.sock2"):
                    late = await asyncio.to_thread(socket.socket, socket.AF_UNIX)
                    late.connect(str(tmp_path / name))
                    late.close()
                guest.close()
                await until(lambda: new.ports()[0].peer is None)
        predecessor.listener.sock.close()


async def test_a_port_that_cannot_be_taken_over_is_named(tmp_path: Path) -> None:
    """The data say that there is a queue of an interface, and no descriptor comes with it."""
    async with Switch() as new:
        from viaduct.switch.ports import make_port

        port = make_port(new, "tap", TapPort(ifname="nowhere0"))
        with pytest.raises(ValueError, match="no file descriptor number 0"):
            await port.adopt(PortData(name="tap", taps=[0]), Fds())
        await port.close()


def test_formats_are_ascending() -> None:
    assert list(FORMATS) == sorted(set(FORMATS))
