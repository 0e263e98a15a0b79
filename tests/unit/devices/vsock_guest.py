"""A guest's side of the socket device: packets in and out of a `Slot`'s rings, nothing more."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from devices.slot import PATIENCE, PLACE, Slot
from viaduct.devices.vsock import EVENTS, RECEIVE, TRANSMIT, Vsock
from viaduct.virtio.vsock_config import HOST_CID
from viaduct.virtio.vsock_packet import HEADER_SIZE, VsockHeader, VsockOp

CID = 7
ROOM = 1 << 16


class VsockGuest:
    """Sends packets and takes those that come. `buffers` receive buffers of `size` bytes are kept supplied."""

    def __init__(self, slot: Slot, buffers: int = 16, size: int = PLACE) -> None:
        self.slot = slot
        self.receive, self.transmit, self.events = slot.rings[RECEIVE], slot.rings[TRANSMIT], slot.rings[EVENTS]
        self.size = size
        for _ in range(buffers):
            self.receive.add(room=size)

    def post(
        self,
        op: int,
        guest_port: int,
        host_port: int,
        data: bytes = b"",
        *,
        flags: int = 0,
        room: int = ROOM,
        taken: int = 0,
        kick: bool = True,
        **changes: int,
    ) -> None:
        """Sends a packet and does not wait until it was taken."""
        header = VsockHeader(
            CID, HOST_CID, guest_port, host_port, len(data), 1, op, flags, buf_alloc=room, fwd_cnt=taken
        )
        self.transmit.add(out=[header._replace(**changes).pack(), data], kick=kick)

    async def send(self, op: int, guest_port: int, host_port: int, data: bytes = b"", **more: int) -> None:
        """Sends a packet and waits until it was taken."""
        self.post(op, guest_port, host_port, data, **more)  # type: ignore[arg-type]
        await self.transmit.next_used()

    async def packet(self) -> tuple[VsockHeader, bytes]:
        """The next packet for the guest."""
        _, data = await self.receive.next_used()
        self.receive.add(room=self.size)
        return VsockHeader.unpack(data[:HEADER_SIZE]), data[HEADER_SIZE:]

    async def expect(self, op: VsockOp, guest_port: int, host_port: int) -> tuple[VsockHeader, bytes]:
        """The next packet, which is this."""
        header, data = await self.packet()
        assert (header.op, header.dst_port, header.src_port) == (op, guest_port, host_port), header
        assert (header.src_cid, header.dst_cid, header.len, header.type) == (HOST_CID, CID, len(data), 1)
        return header, data

    async def nothing(self) -> None:
        """The device has nothing more to say. (What it does with one more packet is known: so much was to come.)"""
        await self.send(VsockOp.RW, 9, 9)
        await self.expect(VsockOp.RST, 9, 9)


class HostProgram:
    """A program of the host that listens on PATH_PORT."""

    def __init__(self, path: Path, port: int) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(f"{path}_{port}")
        self.sock.listen(64)
        self.sock.setblocking(False)

    async def accept(self) -> socket.socket:
        sock, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(self.sock), PATIENCE)
        sock.setblocking(False)
        return sock


async def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly so many bytes, or what came before the end."""
    data = b""
    async with asyncio.timeout(PATIENCE):
        while len(data) < count and (part := await asyncio.get_running_loop().sock_recv(sock, count - len(data))):
            data += part
    return data


async def dial(path: Path, line: bytes) -> socket.socket:
    """A program of the host that connects and sends a line."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    await asyncio.get_running_loop().sock_sendall(sock, line)
    return sock


@asynccontextmanager
async def vsock(**options: int) -> AsyncIterator[tuple[Vsock, VsockGuest, Path]]:
    """A device with its guest, and the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="vs") as directory:
        path = Path(directory) / "v"
        device = Vsock(str(path), guest_cid=CID, **options)
        async with Slot(device) as slot:
            yield device, VsockGuest(slot), path
        device.close()
        assert not path.exists()
        assert not device.connections
