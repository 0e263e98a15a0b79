"""A malicious front-end: one session after the other against a running switch, each drawn from a seed of its own.

    python -m soak.hostile_session SOCKET --seed 7 --first 0 --sessions 100     (in the directory tests)

A session connects, mostly negotiates and starts rings as it should, and then does what comes to its mind: legal and
illegal requests in any order, with descriptors of wrong kinds and numbers; memory truncated, punched, unplugged; rings
rewritten while they run; eventfds that block; messages cut in the middle. It prints its number first, so that the last
line names the session that hurt, and `--first N --sessions 1` repeats it.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence

from soak import hostile_files
from soak.hostile_memory import SIZE, USER, HostileMemory

HEADER = struct.Struct("=III")
VERSION, NEED_REPLY = 1, 8
PACKED, PROTOCOL_FEATURES = 1 << 34, 1 << 30
QUEUES = 2
PATIENCE = 0.1
"""Seconds for an answer, once a session misbehaves; before that one second."""
MOST_FDS = 253
"""SCM_MAX_FD of the kernel."""
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_NUM, SET_ADDR, SET_BASE, GET_BASE, SET_KICK, SET_CALL, SET_ERR = 8, 9, 10, 11, 12, 13, 14
GET_PROTOCOL, SET_PROTOCOL, SET_ENABLE, SEND_RARP = 15, 16, 18, 19
ADD_REGION, REMOVE_REGION = 37, 38
REQUESTS = range(45)
"""All that are defined, and some that are not."""


class HostileSession:
    """One connection and what it owns."""

    def __init__(self, path: str, chance: random.Random) -> None:
        self.chance = chance
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(1)
        self.socket.connect(path)
        self.memory = HostileMemory(chance, QUEUES)
        self.fds: list[int] = []
        self.kicks: list[int] = []
        self.calls: list[int] = []
        self.features = 0

    def close(self) -> None:
        self.socket.close()
        self.memory.close()
        for fd in self.fds:
            os.close(fd)

    def own(self, fd: int) -> int:
        """Closes `fd` with the session."""
        self.fds.append(fd)
        return fd

    # Messages.

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION) -> None:
        """One message, whole and at once."""
        self.raw(HEADER.pack(request, flags, len(payload)) + payload, fds)

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes as they are."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)

    def ask(self, request: int, payload: bytes = b"") -> int:
        """A request that is answered with a number."""
        self.send(request, payload)
        while True:
            answer, size = self._exactly(HEADER.size), 0
            found, _, size = HEADER.unpack(answer)
            body = self._exactly(size)
            if found == request and size == 8:
                return int(struct.unpack("=Q", body)[0])

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece, rights, _, _ = self.socket.recvmsg(size - len(data), socket.CMSG_SPACE(64))
            self._discard(rights)
            if not piece:
                raise ConnectionResetError
            data += piece
        return data

    @staticmethod
    def _discard(rights: Sequence[tuple[int, int, bytes]]) -> None:
        for _, _, content in rights:
            for fd in struct.unpack(f"={len(content) // 4}i", content):
                os.close(fd)

    def hear(self) -> None:
        """Reads what has been answered, and does not care."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, rights, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(1024), socket.MSG_DONTWAIT)
                self._discard(rights)
                if not data:
                    raise ConnectionResetError

    # What a good front-end does.

    def negotiate(self) -> None:
        """Features: as offered, or some of them."""
        offered = self.ask(GET_FEATURES)
        self.features = offered & (self.chance.getrandbits(64) | 1 << 32 | PROTOCOL_FEATURES)
        if self.chance.random() < 0.9:
            protocol = self.ask(GET_PROTOCOL)
            if self.chance.random() < 0.3:
                protocol &= self.chance.getrandbits(64)
            self.send(SET_PROTOCOL, struct.pack("=Q", protocol))
        self.send(SET_OWNER)
        self.send(SET_FEATURES, struct.pack("=Q", self.features))

    @property
    def packed(self) -> bool:
        return bool(self.features & PACKED)

    def share(self) -> None:
        """The memory, whole or in two pieces."""
        half = SIZE // 2
        if self.chance.random() < 0.5:
            self.send(SET_MEM_TABLE, _table((0, SIZE, USER, 0)), [self.memory.fd])
        else:
            table = _table((0, half, USER, 0), (half, half, USER + half, half))
            self.send(SET_MEM_TABLE, table, [self.memory.fd] * 2)

    def start(self, queue: int) -> None:
        """One ring."""
        kick, call = self.own(os.eventfd(0)), self.own(os.eventfd(0))
        self.kicks.append(kick)
        self.calls.append(call)
        descriptors, used, available = self.memory.place(queue)
        base = 0x80008000 if self.packed else 0
        self.send(SET_NUM, struct.pack("=II", queue, self.memory.size))
        self.send(SET_BASE, struct.pack("=II", queue, base))
        self.send(SET_ADDR, struct.pack("=IIQQQQ", queue, 0, descriptors, used, available, 0))
        self.send(SET_CALL, struct.pack("=Q", queue), [call])
        self.send(SET_KICK, struct.pack("=Q", queue), [kick])
        self.send(SET_ENABLE, struct.pack("=II", queue, 1))

    def traffic(self) -> None:
        """Buffers and frames, and kicks."""
        self.memory.frames()
        for queue in range(QUEUES):
            self.memory.fill(queue, self.packed)
        for kick in self.kicks:
            _signal(kick)

    # What it should not do.

    def misbehave(self) -> None:
        """One thing or another."""
        acts = (
            *(self._any_request,) * 6,
            *(self._right_request_at_the_wrong_time,) * 4,
            *(self._rewrite_rings,) * 4,
            *(self.traffic,) * 6,
            self._torment_memory,
            self._unplug_memory,
            self._many_regions,
            self._block_calls,
            self._block_calls,
            self._message_in_pieces,
            self._noise,
            self._many_descriptors,
            self._pass_itself,
            self._flood_requests,
        )
        self.chance.choice(acts)()
        self.hear()

    def _payload(self, request: int) -> bytes:
        chance = self.chance
        index = chance.choice((0, 0, 1, 1, 2, 255, 0xFFFFFFFF))
        number = chance.choice((0, 1, 2, 256, 32768, 0x80008000, 0xFFFFFFFF, chance.getrandbits(32)))
        word = chance.choice((0, 1, 1 << 30 | 1 << 32, 0x100, self.features, chance.getrandbits(64)))
        address = chance.choice((USER, USER + 0x8000, USER + SIZE - 16, 0, 1, (1 << 64) - 8192, chance.getrandbits(63)))
        likely: dict[int, bytes] = {
            SET_MEM_TABLE: _table(*(self._region() for _ in range(chance.randrange(9)))),
            SET_ADDR: struct.pack("=IIQQQQ", index, chance.getrandbits(1), address, address + 64, address + 4096, word),
            ADD_REGION: struct.pack("=QQQQQ", 0, *self._region()),
            REMOVE_REGION: struct.pack("=QQQQQ", 0, *self._region()),
            24: struct.pack("=III", number & 0xFF, chance.randrange(300), 0) + bytes(chance.randrange(260)),
        }
        if request in (SET_NUM, SET_BASE, GET_BASE, SET_ENABLE):
            payload = struct.pack("=II", index, number)
        else:
            payload = likely.get(request, struct.pack("=Q", word))
        if chance.random() < 0.1:
            payload = chance.choice((payload[:-1], payload + b"\0", b"", chance.randbytes(chance.randrange(400))))
        return payload

    def _region(self) -> tuple[int, int, int, int]:
        chance = self.chance
        start = chance.choice((0, SIZE, 1 << 32, 1 << 63, (1 << 64) - 4096, chance.getrandbits(64)))
        size = chance.choice((SIZE, 4096, 1, 0, 1 << 40, 1 << 63, (1 << 64) - 1))
        user = chance.choice((USER, USER + SIZE, start, chance.getrandbits(64)))
        return start, size, user & (1 << 64) - 1, chance.choice((0, 0, 4096, 1, SIZE, chance.getrandbits(64)))

    def _descriptors(self, request: int) -> list[int]:
        chance = self.chance
        wanted = {SET_KICK: 1, SET_CALL: 1, SET_ERR: 1, ADD_REGION: 1, SET_MEM_TABLE: chance.randrange(9)}.get(
            request, 0
        )
        if chance.random() < 0.1:
            wanted = chance.randrange(12)
        usual = self.memory.fd if request in (SET_MEM_TABLE, ADD_REGION) else self.own(os.eventfd(0))
        return [usual if chance.random() < 0.6 else self.own(hostile_files.strange(chance)) for _ in range(wanted)]

    def _any_request(self) -> None:
        request = self.chance.choice((*REQUESTS, *range(8, 15), 37, 38, 0xFFFF))
        flags = self.chance.choice((VERSION, *(VERSION | NEED_REPLY,) * 6, 0, 5, 0xFFFFFFFD))
        self.send(request, self._payload(request), self._descriptors(request), flags)

    def _right_request_at_the_wrong_time(self) -> None:
        queue = self.chance.randrange(QUEUES)
        match self.chance.randrange(7):
            case 0:
                self.send(GET_BASE, struct.pack("=II", queue, 0))
            case 1:
                self.start(queue)
            case 2:
                self.send(SET_ENABLE, struct.pack("=II", queue, self.chance.randrange(2)))
            case 3:
                self.share()
            case 4:
                self.negotiate()
            case 5:
                self.send(SET_KICK, struct.pack("=Q", queue | 0x100))
            case _:
                self.send(SEND_RARP, self.chance.randbytes(8))

    def _rewrite_rings(self) -> None:
        until = time.monotonic() + self.chance.choice((0.0002, 0.001, 0.005))
        while time.monotonic() < until:
            self.memory.scribble()
            for kick in self.kicks:
                _signal(kick)

    def _torment_memory(self) -> None:
        self.traffic()
        hostile_files.torment(self.memory.fd, SIZE, self.chance)
        for kick in self.kicks:
            _signal(kick)

    def _unplug_memory(self) -> None:
        self.traffic()
        half = SIZE // 2
        region = self.chance.choice(((0, SIZE, USER, 0), (half, half, USER + half, half), (0, half, USER, 0)))
        self.send(REMOVE_REGION, struct.pack("=QQQQQ", 0, *region), [self.own(os.dup(self.memory.fd))])
        self.traffic()
        if self.chance.random() < 0.5:
            self.send(ADD_REGION, struct.pack("=QQQQQ", 0, *region), [self.memory.fd])

    def _many_regions(self) -> None:
        for number in range(self.chance.choice((3, 20, 600))):
            start = 1 << 40 | number << 21
            region = struct.pack("=QQQQQ", 0, start, self.chance.choice((4096, 1 << 20)), start, 0)
            self.send(ADD_REGION, region, [self.memory.fd])
            self.hear()

    def _block_calls(self) -> None:
        """Fills its call eventfds and lets writers wait, again and again, while frames arrive."""
        self.traffic()
        for call in self.calls:
            for _ in range(self.chance.choice((1, 100))):
                os.set_blocking(call, False)
                with contextlib.suppress(BlockingIOError):
                    os.write(call, hostile_files.UNTIL_FULL)
                os.set_blocking(call, True)
            if self.chance.random() < 0.3:
                os.set_blocking(call, False)
                with contextlib.suppress(BlockingIOError):
                    os.read(call, 8)
                os.set_blocking(call, True)
        self.traffic()

    def _message_in_pieces(self) -> None:
        payload = self._payload(SET_MEM_TABLE)
        message = HEADER.pack(SET_MEM_TABLE, VERSION, len(payload)) + payload
        at = 0
        while at < len(message):
            end = at + self.chance.randint(1, 24)
            self.raw(message[at:end], [self.memory.fd] if self.chance.random() < 0.2 else ())
            at = end
            if self.chance.random() < 0.05:
                raise ConnectionAbortedError

    def _noise(self) -> None:
        self.raw(self.chance.randbytes(self.chance.randint(1, 5000)), [self.memory.fd] * self.chance.randrange(3))

    def _many_descriptors(self) -> None:
        request = self.chance.choice((SET_MEM_TABLE, SET_KICK, GET_FEATURES))
        self.send(request, self._payload(request), [self.memory.fd] * self.chance.choice((8, 9, 64, MOST_FDS)))

    def _pass_itself(self) -> None:
        request = self.chance.choice((SET_KICK, SET_CALL, ADD_REGION, 21))
        self.send(request, self._payload(request), [self.socket.fileno()])

    def _flood_requests(self) -> None:
        """Questions whose answers it does not read."""
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(self.chance.choice((10, 2000))):
                self.send(GET_FEATURES)
        self.socket.settimeout(PATIENCE)

    def play(self) -> None:
        """The whole session. Ends when it has had enough, or the switch has."""
        if self.chance.random() < 0.95:
            self.negotiate()
            self.share()
            for queue in range(QUEUES):
                self.start(queue)
            self.traffic()
        self.socket.settimeout(PATIENCE)
        for _ in range(self.chance.randint(1, 40)):
            self.misbehave()
        if self.chance.random() < 0.3:
            self.raw(HEADER.pack(SET_MEM_TABLE, VERSION, 40)[: self.chance.randint(1, 12)])


def _table(*regions: tuple[int, int, int, int]) -> bytes:
    body = b"".join(struct.pack("=QQQQ", *region) for region in regions)
    return struct.pack("=II", len(regions), 0) + body


def _signal(fd: int) -> None:
    # Not by `write`: the switch, or a strange descriptor, may have made it one that blocks.
    os.set_blocking(fd, False)
    with contextlib.suppress(OSError):
        os.write(fd, struct.pack("=Q", 1))


def run(path: str, seed: int, number: int) -> None:
    """Plays session `number` of `seed`."""
    # The switch ends the connection, or does not answer in a second what it was asked: both are its right, and so
    # is a queue of connections that is full for a moment.
    with contextlib.suppress(ConnectionError, TimeoutError, BlockingIOError):
        session = HostileSession(path, random.Random(f"{seed} {number}"))
        try:
            session.play()
        finally:
            session.close()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="plays malicious front-ends")
    parser.add_argument("socket")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=1)
    options = parser.parse_args()
    for number in range(options.first, options.first + options.sessions):
        print(f"session {number} of seed {options.seed}", flush=True)
        run(options.socket, options.seed, number)
    print("no more sessions", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
