"""Sockets between guest and host, the guest's packets made by hand."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from devices.slot import Slot, until
from devices.vsock_guest import CID, HostProgram, VsockGuest, dial, receive, vsock
from viaduct.devices.vsock import EVENTS, RESETS_MAX, Vsock
from viaduct.devices.vsock_connection import BUFFER
from viaduct.virtio.vsock_packet import VsockOp, VsockShutdown

REQUEST, RESPONSE, RST, SHUTDOWN, RW = (
    VsockOp.REQUEST,
    VsockOp.RESPONSE,
    VsockOp.RST,
    VsockOp.SHUTDOWN,
    VsockOp.RW,
)
CREDIT_UPDATE, CREDIT_REQUEST = VsockOp.CREDIT_UPDATE, VsockOp.CREDIT_REQUEST


async def from_guest(guest: VsockGuest, path: Path, **more: int) -> socket.socket:
    """The guest's port 1000 has connected to the host's port 53; returns the host's end."""
    program = HostProgram(path, 53)
    await guest.send(REQUEST, 1000, 53, b"", **more)
    header, _ = await guest.expect(RESPONSE, 1000, 53)
    assert header.buf_alloc == BUFFER
    sock = await program.accept()
    program.sock.close()
    return sock


async def test_a_guest_reaches_a_program_of_the_host() -> None:
    async with vsock() as (_, guest, path):
        sock = await from_guest(guest, path)
        for number in range(50):
            text = b"question %d" % number
            await guest.send(RW, 1000, 53, text)
            assert await receive(sock, len(text)) == text
            sock.send(b"answer")
            assert (await guest.expect(RW, 1000, 53))[1] == b"answer"
        sock.close()
        header, _ = await guest.expect(SHUTDOWN, 1000, 53)
        assert header.flags == VsockShutdown.BOTH
        await guest.send(RST, 1000, 53)
        await guest.nothing()


async def test_a_program_of_the_host_reaches_the_guest() -> None:
    async with vsock() as (device, guest, path):
        sock = await dial(path, b"CONNECT 1024\n")
        header, _ = await guest.packet()
        assert (header.op, header.dst_port) == (REQUEST, 1024)
        await guest.send(RESPONSE, 1024, header.src_port)
        assert await receive(sock, 14) == b"OK %d\n" % header.src_port
        await guest.send(RW, 1024, header.src_port, b"welcome")
        assert await receive(sock, 7) == b"welcome"
        sock.send(b"thank you")
        assert (await guest.expect(RW, 1024, header.src_port))[1] == b"thank you"
        await guest.send(SHUTDOWN, 1024, header.src_port, flags=VsockShutdown.BOTH)
        await guest.expect(RST, 1024, header.src_port)
        assert await receive(sock, 1) == b""
        assert not device.connections


async def test_what_the_host_sends_at_once_is_not_lost() -> None:
    async with vsock() as (_, guest, path):
        sock = await dial(path, b"connect 1024\r\nGET / HTTP/1.0\r\n\r\n")
        header, _ = await guest.packet()
        await guest.send(RESPONSE, 1024, header.src_port)
        assert (await guest.expect(RW, 1024, header.src_port))[1] == b"GET / HTTP/1.0\r\n\r\n"
        sock.close()


async def test_two_at_once_to_one_port_of_the_guest() -> None:
    async with vsock() as (_, guest, path):
        socks = [await dial(path, b"CONNECT 1024\n") for _ in range(2)]
        ports = [(await guest.packet())[0].src_port for _ in socks]
        assert ports[0] != ports[1]
        for port in ports:
            await guest.send(RESPONSE, 1024, port)
        for sock, port in zip(socks, ports, strict=True):
            assert await receive(sock, 14) == b"OK %d\n" % port
            sock.close()


@pytest.mark.parametrize("line", [b"HELLO\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967295\n", b"x" * 40])
async def test_lines_that_make_no_sense(line: bytes) -> None:
    async with vsock() as (_, guest, path):
        sock = await dial(path, line)
        assert (await receive(sock, 1000)).startswith(b"ERROR: CONNECT and a port")
        sock.close()
        await guest.nothing()


async def test_a_guest_that_refuses() -> None:
    async with vsock() as (device, guest, path):
        sock = await dial(path, b"CONNECT 1\n")
        header, _ = await guest.packet()
        await guest.send(RST, 1, header.src_port)
        assert await receive(sock, 1) == b""
        assert not device.connections
        sock.close()


async def test_nobody_listens_there() -> None:
    async with vsock() as (_, guest, _path):
        await guest.send(REQUEST, 1000, 53)
        await guest.expect(RST, 1000, 53)


async def test_what_belongs_to_no_connection_gets_a_reset() -> None:
    async with vsock() as (_, guest, _path):
        for op in (RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, VsockOp.INVALID, 77):
            await guest.send(op, 5, 6, b"data")
            await guest.expect(RST, 5, 6)
        await guest.send(REQUEST, 5, 6, type=2)  # No SEQPACKET here.
        assert (await guest.packet())[0][:7] == (2, CID, 6, 5, 0, 2, RST)
        await guest.send(REQUEST, 5, 6, dst_cid=99)
        assert (await guest.packet())[0][:7] == (99, CID, 6, 5, 0, 1, RST)
        for op, changes in ((RST, {}), (RW, {"src_cid": 3}), (REQUEST, {"src_cid": 2, "dst_cid": CID})):
            await guest.send(op, 5, 6, **changes)  # type: ignore[arg-type]
        guest.transmit.add(out=b"shorter than a header")
        guest.transmit.add(out=b"", room=60)
        for _ in range(2):
            await guest.transmit.next_used()
        await guest.nothing()


@pytest.mark.parametrize(
    ("op", "more"),
    [
        (REQUEST, {"type": 2}),
        (RESPONSE, {}),
        (VsockOp.INVALID, {}),
        (99, {}),
        (RW, {"len": 5000}),
        (RW, {"len": 0xFFFFFFFF}),
        (RW, {"type": 2}),
    ],
)
async def test_packets_that_break_a_connection(op: int, more: dict[str, int]) -> None:
    async with vsock() as (device, guest, path):
        sock = await from_guest(guest, path)
        await guest.send(op, 1000, 53, b"", **more)
        assert (await guest.packet())[0].op == RST
        assert await receive(sock, 1) == b""
        assert not device.connections
        sock.close()


async def test_the_same_request_again_begins_anew() -> None:
    async with vsock() as (_, guest, path):
        old = await from_guest(guest, path)
        os.unlink(f"{path}_53")
        new = await from_guest(guest, path)
        assert await receive(old, 1) == b""
        await guest.send(RW, 1000, 53, b"new")
        assert await receive(new, 3) == b"new"
        old.close()
        new.close()


async def test_the_guest_gets_no_more_than_it_has_room_for() -> None:
    async with vsock() as (_, guest, path):
        sock = await from_guest(guest, path, room=10)
        sock.send(b"0123456789abcdefghij")
        assert (await guest.expect(RW, 1000, 53))[1] == b"0123456789"
        await guest.expect(CREDIT_REQUEST, 1000, 53)
        await guest.send(CREDIT_UPDATE, 1000, 53, room=10, taken=0)  # Nothing new: not asked again.
        await guest.nothing()
        await guest.send(CREDIT_UPDATE, 1000, 53, room=10, taken=4)
        assert (await guest.expect(RW, 1000, 53))[1] == b"abcd"
        await guest.expect(CREDIT_REQUEST, 1000, 53)
        await guest.send(CREDIT_UPDATE, 1000, 53, room=4000, taken=14)
        assert (await guest.expect(RW, 1000, 53))[1] == b"efghij"
        sock.close()


async def test_credit_that_cannot_be() -> None:
    async with vsock() as (_, guest, path):
        sock = await from_guest(guest, path, room=100)
        sock.send(b"x")
        await guest.expect(RW, 1000, 53)
        await guest.send(CREDIT_UPDATE, 1000, 53, room=100, taken=77)  # More than was ever sent.
        sock.send(b"y")
        await guest.expect(CREDIT_REQUEST, 1000, 53)
        await guest.send(CREDIT_UPDATE, 1000, 53, room=0xFFFFFFFF, taken=1)
        assert (await guest.expect(RW, 1000, 53))[1] == b"y"
        sock.close()


async def test_a_host_that_does_not_read_stops_the_guest_by_its_credit() -> None:
    async with vsock() as (device, guest, path):
        sock = await from_guest(guest, path)
        (connection,) = device.connections.values()
        sent = 0
        data = os.urandom(4096)
        while connection.guest_credit >= len(data):
            await guest.send(RW, 1000, 53, data)
            sent += len(data)
            while guest.receive.arrived():
                await guest.expect(CREDIT_UPDATE, 1000, 53)
        assert len(connection.received) <= BUFFER
        await guest.send(CREDIT_REQUEST, 1000, 53)
        header, _ = await guest.expect(CREDIT_UPDATE, 1000, 53)
        assert header.buf_alloc - (sent - header.fwd_cnt) < len(data)
        assert await receive(sock, sent) == data * (sent // len(data))
        header, _ = await guest.expect(CREDIT_UPDATE, 1000, 53)
        while header.fwd_cnt < sent - BUFFER // 4:
            header, _ = await guest.expect(CREDIT_UPDATE, 1000, 53)
        await until(lambda: connection.guest_credit == BUFFER)
        sock.close()


async def test_more_than_the_credit_ends_the_connection() -> None:
    async with vsock() as (device, guest, path):
        sock = await from_guest(guest, path)
        (connection,) = device.connections.values()
        while connection.guest_credit >= 4096:
            await guest.send(RW, 1000, 53, bytes(4096))
            while guest.receive.arrived():
                await guest.expect(CREDIT_UPDATE, 1000, 53)
        guest.post(RW, 1000, 53, bytes(8000))
        while (await guest.packet())[0].op != RST:
            pass
        assert not device.connections
        sock.close()


async def test_half_closed_by_the_host() -> None:
    async with vsock() as (device, guest, path):
        sock = await from_guest(guest, path)
        sock.send(b"last words")
        sock.shutdown(socket.SHUT_WR)
        assert (await guest.expect(RW, 1000, 53))[1] == b"last words"
        header, _ = await guest.expect(SHUTDOWN, 1000, 53)
        assert header.flags == VsockShutdown.SEND
        await guest.send(RW, 1000, 53, b"and an answer")
        assert await receive(sock, 13) == b"and an answer"
        sock.close()
        header, _ = await guest.expect(SHUTDOWN, 1000, 53)
        assert header.flags == VsockShutdown.BOTH
        await guest.send(SHUTDOWN, 1000, 53, flags=VsockShutdown.BOTH)
        await guest.expect(RST, 1000, 53)
        assert not device.connections


async def test_half_closed_by_the_guest() -> None:
    async with vsock() as (_, guest, path):
        sock = await from_guest(guest, path)
        await guest.send(RW, 1000, 53, b"question")
        await guest.send(SHUTDOWN, 1000, 53, flags=VsockShutdown.SEND)
        assert await receive(sock, 100) == b"question"
        sock.send(b"answer")
        assert (await guest.expect(RW, 1000, 53))[1] == b"answer"
        await guest.send(RW, 1000, 53, b"more")  # It said that it would not.
        await guest.expect(RST, 1000, 53)
        sock.close()


async def test_a_guest_that_receives_no_more() -> None:
    async with vsock() as (_, guest, path):
        sock = await from_guest(guest, path)
        await guest.send(SHUTDOWN, 1000, 53, flags=VsockShutdown.RECEIVE)
        await guest.send(RW, 1000, 53, b"still sending")
        assert await receive(sock, 13) == b"still sending"
        with pytest.raises(BrokenPipeError):
            sock.send(b"nobody wants to know")
        await guest.nothing()
        sock.close()


async def test_what_the_guest_sent_before_it_dropped_the_connection_arrives() -> None:
    async with vsock() as (device, guest, path):
        sock = await from_guest(guest, path)
        (connection,) = device.connections.values()
        data = os.urandom(4096)
        sent = 0
        while connection.guest_credit >= 4096:
            await guest.send(RW, 1000, 53, data)
            sent += 4096
            while guest.receive.arrived():
                await guest.packet()
        await guest.send(RST, 1000, 53)
        assert not device.connections
        assert await receive(sock, sent + 1) == data * (sent // 4096)
        sock.close()


async def test_a_host_that_leaves_while_the_guest_sends() -> None:
    async with vsock() as (_, guest, path):
        sock = await from_guest(guest, path)
        await guest.send(RW, 1000, 53, b"unread")
        sock.close()
        header, _ = await guest.expect(SHUTDOWN, 1000, 53)
        assert header.flags == VsockShutdown.BOTH
        for _ in range(100):  # Its bytes go nowhere, and its credit is given back.
            await guest.send(RW, 1000, 53, bytes(8000))
            while guest.receive.arrived():
                await guest.expect(CREDIT_UPDATE, 1000, 53)
        await guest.send(RST, 1000, 53)
        await guest.nothing()


async def test_many_connections_take_turns() -> None:
    async with vsock() as (device, guest, path):
        program = HostProgram(path, 53)
        socks = {}
        for port in range(100, 140):
            await guest.send(REQUEST, port, 53)
            await guest.expect(RESPONSE, port, 53)
            socks[port] = await program.accept()
        assert len(device.connections) == 40
        for port, sock in socks.items():
            sock.send(b"%d" % port * 2000)
        got = dict.fromkeys(socks, b"")
        while any(len(data) < 6000 for data in got.values()):
            header, data = await guest.packet()
            assert header.op == RW
            got[header.dst_port] += data
        assert all(data == b"%d" % port * 2000 for port, data in got.items())
        for port in socks:
            await guest.send(SHUTDOWN, port, 53, flags=VsockShutdown.BOTH)
            await guest.expect(RST, port, 53)
            socks[port].close()
        program.sock.close()


async def test_no_more_connections_than_allowed() -> None:
    async with vsock(connections_max=3) as (device, guest, path):
        program = HostProgram(path, 53)
        for port in range(3):
            await guest.send(REQUEST, port, 53)
            await guest.expect(RESPONSE, port, 53)
        await guest.send(REQUEST, 3, 53)
        await guest.expect(RST, 3, 53)
        sock = await dial(path, b"")
        assert await receive(sock, 1) == b""
        await guest.send(RST, 0, 53)
        await guest.send(REQUEST, 3, 53)
        await guest.expect(RESPONSE, 3, 53)
        assert len(device.connections) == 3
        program.sock.close()
        sock.close()


async def test_a_flood_of_nonsense_waits_for_its_answers() -> None:
    async with vsock() as (_device, guest, _path):
        for _ in range(16):  # No buffers are left.
            await guest.send(RW, 1, 1)
        await until(lambda: guest.receive.arrived() == 16)
        total = 0
        for _ in range(10):
            for port in range(20):
                if guest.transmit.core.free < 4:
                    guest.transmit.collect()
                if guest.transmit.core.free >= 4 and guest.transmit.free:
                    guest.post(RW, port, 1)
                    total += 1
            await asyncio.sleep(0.001)
        await until(lambda: guest.transmit.arrived() >= RESETS_MAX)
        assert len(guest.transmit.used) == RESETS_MAX < total
        seen = 0
        while seen < total + 16:
            header, _ = await guest.packet()
            assert header.op == RST
            seen += 1
        await guest.nothing()


async def test_a_reset_of_the_device_ends_all() -> None:
    async with vsock() as (device, guest, path):
        sock = await from_guest(guest, path)
        await guest.slot.reset()
        assert await receive(sock, 1) == b""
        assert not device.connections
        sock.close()
        again = VsockGuest(guest.slot)
        await again.nothing()


async def test_a_pause_ends_nothing() -> None:
    async with vsock() as (_, guest, path):
        sock = await from_guest(guest, path)
        await guest.slot.stop()
        sock.send(b"meanwhile")
        await asyncio.sleep(0.01)
        guest.slot.start()
        assert (await guest.expect(RW, 1000, 53))[1] == b"meanwhile"
        await guest.send(RW, 1000, 53, b"and on")
        assert await receive(sock, 6) == b"and on"
        sock.close()


async def test_after_a_restore_the_guest_is_told_that_its_connections_are_gone(tmp_path: Path) -> None:
    from viaduct.vhost_user.handover import Fds

    device = Vsock(str(tmp_path / "v"), guest_cid=CID)
    device.restore({}, Fds())
    async with Slot(device) as slot:
        guest = VsockGuest(slot)
        assert await slot.rings[EVENTS].ask(room=4) == bytes(4)
        slot.rings[EVENTS].add(room=4)
        await guest.nothing()
        assert not slot.rings[EVENTS].arrived()
    device.close()


def test_the_guests_address(tmp_path: Path) -> None:
    for cid in (0, 2, 0xFFFFFFFF, 1 << 32):
        with pytest.raises(ValueError, match="3 to 4294967294"):
            Vsock(str(tmp_path / "v"), guest_cid=cid)
    device = Vsock(str(tmp_path / "v"), guest_cid=77)
    assert device.read_config(0, 8) == (77).to_bytes(8, "little")
    device.close()
