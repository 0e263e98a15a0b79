"""One stream between a guest's socket and a UNIX socket of this host (virtio 1.2, 5.10.6).

# How it works

Bytes of the guest wait in `received` until the UNIX socket takes them; we told the guest that there is room for
`BUFFER`, and a guest that sends more has broken the rules. Bytes of the host wait in `unsent` until the driver has
supplied a buffer; nothing is read from the UNIX socket while there are any, nor while the guest has no room for them
(its credit: 5.10.6.3). So a connection costs a bounded amount of memory, whoever does not read.

Each side may say that it will send, or receive, no more (SHUTDOWN). The host's half-close becomes the guest's and the
other way round; when the guest is done with both directions and all of its bytes are written, RST ends it.

The connection never touches a queue. It tells the device, by `wants_to_send`, that it has a packet, and is asked for it
(`next_packet`) when there is a buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from enum import Enum, auto
from typing import TYPE_CHECKING

from viaduct.virtio.vsock_config import HOST_CID
from viaduct.virtio.vsock_packet import VsockHeader, VsockOp, VsockShutdown

if TYPE_CHECKING:
    from viaduct.devices.vsock import Vsock

BUFFER = 256 << 10
"""Bytes of the guest that may wait for the UNIX socket: our buf_alloc."""
PIECE = 64 << 10
"""Bytes read from the UNIX socket at once; more than that no Linux guest takes in a packet."""
UPDATE_AFTER = BUFFER // 4
"""Bytes passed on after which the guest is told that there is room again."""
_COUNT = 0xFFFF_FFFF


class State(Enum):
    """How far a connection is."""

    REQUESTED = auto()
    """The host wants it; the guest has not answered."""
    OPEN = auto()
    LEAVING = auto()
    """The guest knows nothing of it any more; the last bytes are on their way to the UNIX socket."""
    CLOSED = auto()


class VsockConnection:
    """A connection of `device` between `guest_port` and `host_port`; owns the non-blocking socket `sock`."""

    def __init__(
        self,
        device: Vsock,
        guest_port: int,
        host_port: int,
        sock: socket.socket,
        *,
        greeting: bytes = b"",
        unsent: bytes = b"",
        request: bool = False,
    ) -> None:
        """`request`: the host began, and is told `greeting` when the guest accepts; `unsent` are bytes of its that came
        already. Otherwise the guest began and is answered."""
        self.guest_port, self.host_port = guest_port, host_port
        self.state = State.REQUESTED if request else State.OPEN
        self._device = device
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._greeting = greeting
        self._first = VsockOp.REQUEST if request else VsockOp.RESPONSE
        self._answered = False
        self.queued = False
        """The device has it among those that want to send."""
        self.unsent = unsent
        self.received = bytearray()
        # What we sent and the guest's room for it; what the guest sent and we passed on. All modulo 2^32.
        self._sent = self._room = self._taken = 0
        self._came = self._forwarded = self._told_forwarded = 0
        self._guest_ended = VsockShutdown(0)
        self._host_ended = VsockShutdown(0)
        self._told_ended = VsockShutdown(0)
        self._owes_update = False
        self._asks_for_credit = False
        self._asked_for_credit = False
        self._reading = self._writing = False

    # The guest's packets.

    def packet(self, header: VsockHeader, data: bytes) -> bool:
        """Carries out a packet of the guest. False: it broke the rules, and gets a RST."""
        self.learn_room(header)
        match header.op:
            case VsockOp.RESPONSE if self.state is State.REQUESTED and self._answered:
                self.state = State.OPEN
                self.received += self._greeting
                self._flush()
            case _ if self.state is not State.OPEN:
                return False
            case VsockOp.RW:
                if self._guest_ended & VsockShutdown.SEND or len(data) > self.guest_credit:
                    return False
                self._came = (self._came + len(data)) & _COUNT
                if self._host_ended & VsockShutdown.RECEIVE:
                    self._forward(len(data))
                else:
                    self.received += data
                    self._flush()
            case VsockOp.CREDIT_UPDATE:
                pass
            case VsockOp.CREDIT_REQUEST:
                self._owes_update = True
            case VsockOp.SHUTDOWN:
                self._guest_shuts_down(VsockShutdown(header.flags & VsockShutdown.BOTH))
            case _:
                return False
        self._go_on()
        return True

    def learn_room(self, header: VsockHeader) -> None:
        """Every packet says how much room the guest has (virtio 1.2, 5.10.6.3)."""
        self._room, self._taken = header.buf_alloc, header.fwd_cnt
        if self.credit:
            self._asked_for_credit = False  # Asking again and again would get the same answer again and again.

    def _guest_shuts_down(self, flags: VsockShutdown) -> None:
        self._guest_ended |= flags
        if self._guest_ended & VsockShutdown.RECEIVE:
            self.unsent = b""
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)
        self._flush()

    @property
    def guest_credit(self) -> int:
        """How many bytes the guest may send now."""
        return BUFFER - ((self._came - self._forwarded) & _COUNT)

    @property
    def credit(self) -> int:
        """How many bytes we may send now."""
        return max(self._room - ((self._sent - self._taken) & _COUNT), 0)

    # Our packets.

    def next_packet(self, room: int) -> tuple[VsockHeader, bytes] | None:
        """The next packet, with at most `room` bytes of data; None if there is none to send."""
        if self.state not in (State.REQUESTED, State.OPEN):
            return None
        if not self._answered:
            self._answered = True
            self._listen()
            return self._header(self._first), b""
        if self.state is State.REQUESTED:
            return None
        if self.unsent and (size := min(len(self.unsent), self.credit, room)):
            data, self.unsent = self.unsent[:size], self.unsent[size:]
            self._sent = (self._sent + size) & _COUNT
            if not self.unsent:
                self._listen()
            return self._header(VsockOp.RW, length=size), data
        if not self.unsent and self._host_ended != self._told_ended:
            self._told_ended = self._host_ended
            return self._header(VsockOp.SHUTDOWN, flags=int(self._host_ended)), b""
        if self._owes_update:
            return self._header(VsockOp.CREDIT_UPDATE), b""
        if self._asks_for_credit:
            self._asks_for_credit, self._asked_for_credit = False, True
            return self._header(VsockOp.CREDIT_REQUEST), b""
        return None

    def _header(self, op: VsockOp, length: int = 0, flags: int = 0) -> VsockHeader:
        self._told_forwarded, self._owes_update = self._forwarded, False
        return VsockHeader(
            HOST_CID,
            self._device.guest_cid,
            self.host_port,
            self.guest_port,
            len=length,
            op=op,
            flags=flags,
            buf_alloc=BUFFER,
            fwd_cnt=self._forwarded,
        )

    @property
    def wants_to_send(self) -> bool:
        """Whether `next_packet` has one, if there is a byte of room."""
        if not self._answered:
            return self.state in (State.REQUESTED, State.OPEN)
        return self.state is State.OPEN and (
            bool(self.unsent and self.credit)
            or (not self.unsent and self._host_ended != self._told_ended)
            or self._owes_update
            or self._asks_for_credit
        )

    # The UNIX socket.

    def _go_on(self) -> None:
        """After anything has changed: reads if that makes sense now, ends if it is time, and says so."""
        if self.state is State.OPEN and self._guest_ended == VsockShutdown.BOTH and not self.received:
            self._device.reset_connection(self)
            return
        self._listen()
        if self.wants_to_send:
            self._device.has_packet(self)

    def _listen(self) -> None:
        """Watches the UNIX socket exactly while there is use for what it has to say."""
        useful = (
            self.state is State.OPEN
            and self._answered
            and not self.unsent
            and not self._host_ended & VsockShutdown.SEND
            and not self._guest_ended & VsockShutdown.RECEIVE
        )
        starved = self.state is State.OPEN and self._answered and not self.credit
        if starved and (useful or self.unsent) and not self._asked_for_credit:
            self._asks_for_credit = True
        if (useful and not starved) == self._reading:
            return
        self._reading = not self._reading
        if self._reading:
            self._loop.add_reader(self._sock, self._readable)
        else:
            self._loop.remove_reader(self._sock)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(min(self.credit, PIECE))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self.unsent = data
        else:
            self._host_ended |= VsockShutdown.SEND
            if _hung_up(self._sock):
                self._host_ended |= VsockShutdown.RECEIVE
            else:
                self._device.watch_for_end(self._sock, self.host_has_gone)
        self._go_on()

    def host_has_gone(self) -> None:
        """The host's program has closed its socket: nobody reads there any more."""
        self._host_ended = VsockShutdown.BOTH
        self._forward(len(self.received))
        self.received.clear()
        self._go_on()

    def _flush(self) -> None:
        """Writes what the UNIX socket takes, and waits for it to take the rest."""
        while self.received:
            try:
                # A copy of a piece: the buffer must not be locked while it shrinks.
                size = self._sock.send(bytes(self.received[:PIECE]), socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                # What the host has still to say is not lost; what the guest says is.
                self._host_ended |= VsockShutdown.RECEIVE
                size = len(self.received)
            del self.received[:size]
            self._forward(size)
        if bool(self.received) != self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(self._sock, self._writable)
            else:
                self._loop.remove_writer(self._sock)
        if not self.received and self._guest_ended & VsockShutdown.SEND:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        if not self.received and self.state is State.LEAVING:
            self.close()
            self._device.has_left(self)

    def _forward(self, size: int) -> None:
        # The greeting is ours and not the guest's.
        own = min(len(self._greeting), size) if self._greeting else 0
        self._greeting = self._greeting[own:]
        self._forwarded = (self._forwarded + size - own) & _COUNT
        if (self._forwarded - self._told_forwarded) & _COUNT >= UPDATE_AFTER:
            self._owes_update = True

    def _writable(self) -> None:
        self._flush()
        if self.state is State.OPEN:
            self._go_on()

    # Ends.

    def leave(self) -> bool:
        """The guest has dropped the connection. What it sent before still goes to the host; returns whether there is
        any of it."""
        if self.state is State.OPEN and self.received and not self._host_ended & VsockShutdown.RECEIVE:
            self.state = State.LEAVING
            self._listen()
            return True
        self.close()
        return False

    def close(self) -> None:
        """Closes the UNIX socket. May be called twice."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self._reading:
            self._loop.remove_reader(self._sock)
        if self._writing:
            self._loop.remove_writer(self._sock)
        self._reading = self._writing = False
        self._device.forget_end(self._sock)
        self._sock.close()


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))
