"""Sockets between a guest and this host (virtio 1.2, 5.10), on the host's side UNIX sockets.

A program of the host connects to PATH and sends the line ``CONNECT 1024``; when a program of the guest that listens on
port 1024 has accepted, it gets ``OK 1073741824`` (the port it appears to come from), and from there on the stream is
the guest's. A program of the guest that connects to the host (CID 2), port 53, reaches whoever listens on PATH_53.
Firecracker and Cloud Hypervisor do it the same way, so programs for theirs work with ours.

# How it works

Queue 0 carries packets to the guest, queue 1 packets from it, queue 2 events. Connections with something to say take
turns, a packet each (`_send`). What belongs to no connection is answered with RST (5.10.6.4.2); those answers wait for
the driver's buffers, and when `RESETS_MAX` wait, no more packets are taken: as the specification has it, a device goes
on with one queue while the other is full as long as it has room of its own, and no longer (5.10.6.2.1).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from viaduct.devices.vsock_connection import PIECE, State, VsockConnection
from viaduct.devices.vsock_host_side import PORT_MAX, HostSide
from viaduct.devices.vsock_socket_ends import SocketEnds
from viaduct.vhost_user.errors import VhostUserError
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.vhost_user.queue_device import QueueDevice
from viaduct.vhost_user.socket_path import try_connect
from viaduct.virtio.features import DeviceType, VsockFeature
from viaduct.virtio.vsock_config import FIRST_GUEST_CID, HOST_CID, LAST_GUEST_CID, VsockConfig
from viaduct.virtio.vsock_packet import HEADER_SIZE, STREAM, TRANSPORT_RESET, VsockHeader, VsockOp

if TYPE_CHECKING:
    from viaduct.vhost_user.device import Vring
    from viaduct.vhost_user.handover import Fds

log = logging.getLogger("viaduct.devices")

RECEIVE, TRANSMIT, EVENTS = 0, 1, 2
"""The queues, as the driver calls them (virtio 1.2, 5.10.2)."""
CONNECTIONS_MAX = 1024
"""Connections of one guest, those that are being made included."""
RESETS_MAX = 64
"""Answers to packets that belong to no connection that may wait for buffers."""
FIRST_HOST_PORT = 1 << 30
"""From here on connections that the host begins appear to come."""


class Vsock(QueueDevice):
    """The socket device of the guest `guest_cid`; the host's programs find it at the UNIX socket `path`.

    Listens at once. Raises ValueError for a CID that no guest may have, and `viaduct.vhost_user.SocketPathError`.
    """

    device_id = DeviceType.VSOCK
    features = QueueDevice.features | VsockFeature.STREAM
    protocol_features = QueueDevice.protocol_features | ProtocolFeature.CONFIG
    queue_count = 3
    config_size = 8
    pulled_queues = frozenset({RECEIVE, TRANSMIT, EVENTS})

    def __init__(self, path: str, guest_cid: int = FIRST_GUEST_CID, connections_max: int = CONNECTIONS_MAX) -> None:
        super().__init__()
        if not FIRST_GUEST_CID <= guest_cid <= LAST_GUEST_CID:
            raise ValueError(f"guest CID {guest_cid}: {FIRST_GUEST_CID} to {LAST_GUEST_CID} (virtio 1.2, 5.10.4)")
        self.path = str(path)
        self.guest_cid = guest_cid
        self.connections_max = connections_max
        self.connections: dict[tuple[int, int], VsockConnection] = {}
        """Those that the guest knows, by its port and ours."""
        self._host = HostSide(self, self.path)
        self._leaving: set[VsockConnection] = set()
        self._sending: deque[VsockConnection] = deque()
        self._resets: deque[VsockHeader] = deque()
        self._soon: asyncio.Handle | None = None
        self._next_port = FIRST_HOST_PORT
        self._ends = SocketEnds()
        self._tell_of_reset = False

    # Queues.

    def chains_waiting(self, queue: int) -> None:
        if queue == EVENTS:
            self._send_event()
        else:
            self._work()

    def _work(self) -> None:
        """Takes and sends packets, as many as the queues give in one turn."""
        while self._receive() and self._send():
            pass

    def _receive(self) -> bool:
        """Takes the guest's packets, as long as answers to nonsense find room. Returns whether to go on sending."""
        while len(self._resets) < RESETS_MAX and (chain := self.take(TRANSMIT)) is not None:
            start = chain.read(0, HEADER_SIZE)
            if len(start) == HEADER_SIZE:
                header = VsockHeader.unpack(start)
                connection = self.connections.get((header.src_port, header.dst_port))
                complete = header.len <= chain.readable_len - HEADER_SIZE
                # No more is copied than is allowed.
                allowed = complete and connection is not None and header.len <= connection.guest_credit
                self._packet(header, chain.read(HEADER_SIZE, header.len) if allowed else None, connection)
            self.give(TRANSMIT, chain)
        return bool(self._resets or self._sending)

    def _packet(self, header: VsockHeader, data: bytes | None, connection: VsockConnection | None) -> None:
        """Carries out one packet. `data`: None if it is too much, or less than announced."""
        if header.src_cid != self.guest_cid:
            return  # Not its own address: there is nobody to answer.
        if header.dst_cid != HOST_CID or header.type != STREAM:
            self._refuse(header)
        elif header.op == VsockOp.REQUEST:
            self._requested(header)
        elif connection is None or data is None:
            self._refuse(header)
        elif header.op == VsockOp.RST:
            self._dropped(connection)
        elif not connection.packet(header, data):
            self._refuse(header)

    def _send(self) -> bool:
        """Fills the driver's buffers: answers first, then a packet of each connection in turn. Returns whether answers
        found room, so that more packets can be taken."""
        full = len(self._resets) >= RESETS_MAX
        while self._has_packets() and (chain := self.take(RECEIVE)) is not None:
            if chain.writable_len >= HEADER_SIZE:
                chain.write(self._next_packet(min(chain.writable_len - HEADER_SIZE, PIECE)))
            self.give(RECEIVE, chain)
        return full and len(self._resets) < RESETS_MAX

    def _has_packets(self) -> bool:
        while self._sending and not self._sending[0].wants_to_send:
            self._sending.popleft().queued = False
        return bool(self._resets or self._sending)

    def _next_packet(self, room: int) -> bytes:
        """A packet with at most `room` bytes of data; there is one. Empty if the data that is next finds no room."""
        if self._resets:
            return self._resets.popleft().pack()
        connection = self._sending.popleft()
        packet = connection.next_packet(room)
        if connection.wants_to_send:
            self._sending.append(connection)
        else:
            connection.queued = False
        return b"" if packet is None else packet[0].pack() + packet[1]

    def _send_event(self) -> None:
        if self._tell_of_reset and (chain := self.take(EVENTS)) is not None:
            chain.write(TRANSPORT_RESET.to_bytes(4, "little")[: chain.writable_len])
            self.give(EVENTS, chain)
            self._tell_of_reset = False

    # Connections begin.

    def _requested(self, header: VsockHeader) -> None:
        """The guest wants to reach a program of the host."""
        if old := self.connections.pop((header.src_port, header.dst_port), None):
            old.close()  # The guest began anew and forgot to say so.
        if self.full:
            self._refuse(header)
            return
        try:
            sock = try_connect(f"{self.path}_{header.dst_port}")
        except (OSError, VhostUserError) as error:
            log.debug("vsock: the guest cannot reach port %d: %s", header.dst_port, error)
            self._refuse(header)
            return
        connection = VsockConnection(self, header.src_port, header.dst_port, sock)
        connection.learn_room(header)
        self._add(connection)

    @property
    def full(self) -> bool:
        """Whether there are as many connections as there may be."""
        return len(self.connections) + len(self._leaving) + self._host.waiting >= self.connections_max

    def connect(self, sock: socket.socket, guest_port: int, early: bytes) -> VsockConnection:
        """A program of the host wants to reach `guest_port`; `early` is what it has sent already. Takes over `sock`."""
        while (guest_port, self._next_port) in self.connections:
            self._next_port = self._next_port + 1 if self._next_port < PORT_MAX else FIRST_HOST_PORT
        port = self._next_port
        self._next_port = port + 1 if port < PORT_MAX else FIRST_HOST_PORT
        greeting = b"OK %d\n" % port
        connection = VsockConnection(self, guest_port, port, sock, greeting=greeting, unsent=early, request=True)
        self._add(connection)
        return connection

    def _add(self, connection: VsockConnection) -> None:
        self.connections[connection.guest_port, connection.host_port] = connection
        self.has_packet(connection)

    # What connections say.

    def has_packet(self, connection: VsockConnection) -> None:
        """The connection wants to send; it gets its turn."""
        if not connection.queued:
            connection.queued = True
            self._sending.append(connection)
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._now)

    def _now(self) -> None:
        self._soon = None
        self._work()

    def reset_connection(self, connection: VsockConnection) -> None:
        """Ends a connection, and lets the guest know."""
        self._forget(connection)
        self._resets.append(
            VsockHeader(HOST_CID, self.guest_cid, connection.host_port, connection.guest_port, op=VsockOp.RST)
        )
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._now)

    def give_up(self, connection: VsockConnection) -> None:
        """The guest has not answered a connection that the host began, for too long."""
        if connection.state is State.REQUESTED:
            self.reset_connection(connection)

    def has_left(self, connection: VsockConnection) -> None:
        """The last bytes of a connection have reached the host."""
        self._leaving.discard(connection)

    def watch_for_end(self, sock: socket.socket, call: Callable[[], None]) -> None:
        """Calls `call` once when the other end of `sock` has been closed altogether."""
        self._ends.watch(sock, call)

    def forget_end(self, sock: socket.socket) -> None:
        """Ends `watch_for_end`; before the socket is closed."""
        self._ends.forget(sock)

    # Connections end.

    def _refuse(self, header: VsockHeader) -> None:
        """Answers what cannot be with RST, and ends the connection it was about (virtio 1.2, 5.10.6.4.2)."""
        if connection := self.connections.get((header.src_port, header.dst_port)):
            self._forget(connection)
        if header.op != VsockOp.RST:
            self._resets.append(
                VsockHeader(
                    header.dst_cid,
                    header.src_cid,
                    header.dst_port,
                    header.src_port,
                    type=header.type,
                    op=VsockOp.RST,
                )
            )

    def _dropped(self, connection: VsockConnection) -> None:
        """The guest has ended a connection."""
        del self.connections[connection.guest_port, connection.host_port]
        if connection.leave():
            self._leaving.add(connection)

    def _forget(self, connection: VsockConnection) -> None:
        self.connections.pop((connection.guest_port, connection.host_port), None)
        connection.close()

    def _forget_all(self) -> None:
        for connection in (*self.connections.values(), *self._leaving):
            connection.close()
        self.connections.clear()
        self._leaving.clear()
        self._sending.clear()
        self._resets.clear()

    # Life.

    def read_config(self, offset: int, size: int) -> bytes:
        return VsockConfig(self.guest_cid).pack()[offset : offset + size].ljust(size, b"\0")

    def start_queue(self, vring: Vring) -> None:
        super().start_queue(vring)
        self._host.start()

    def reset(self) -> None:
        super().reset()
        self._forget_all()

    def disconnected(self, reason: str) -> None:
        super().disconnected(reason)
        self._host.stop()
        self._forget_all()

    def restore(self, data: dict[str, Any], fds: Fds) -> None:
        """Connections stay with the process that had them; the guest is told (virtio 1.2, 5.10.6.8)."""
        super().restore(data, fds)
        self._tell_of_reset = True

    def close(self) -> None:
        """Ends all connections and removes the socket at `path`. May be called twice."""
        self._forget_all()
        self._host.close()
