"""A console (virtio 1.2, 5.3): bytes between a guest and `ConsoleTerminal`s.

# How it works

Port 0 has queue 0 for what the guest reads and queue 1 for what it writes. With MULTIPORT there are two queues for
control messages, 2 and 3, and further ports from queue 4 on, two each (virtio 1.2, 5.3.2). What the guest writes goes
into the port's terminal at once and never waits. What somebody types stays in the terminal, which is bounded, until the
guest has supplied a buffer and, with MULTIPORT, opened the port.

Control messages tell the driver which ports there are; it says when it is ready for each, and is told then what the
port is (5.3.6.2). A driver that asks and does not read the answers is not listened to any more: answers wait for
buffers of its own, and no more than `ANSWERS_MAX` of them.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.devices.seldom import Seldom
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.vhost_user.queue_device import QueueDevice
from viaduct.virtio.console_config import EMERGENCY_WRITE, ConsoleConfig
from viaduct.virtio.features import ConsoleFeature, DeviceType

if TYPE_CHECKING:
    from viaduct._core import Chain
    from viaduct.vhost_user.handover import Fds

log = logging.getLogger("viaduct.devices")

CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
"""Control messages to and from the driver."""
PORTS_MAX = 31
"""What a driver is sure to have room for (the bits of its bitmaps)."""
OUTPUT_MAX = 1 << 20
"""Bytes that one buffer may hold; what is beyond is cut off."""
INPUT_PART = 4096
"""Bytes typed into one buffer at most."""
ANSWERS_MAX = 8
"""Control messages that may wait for buffers, beside those about each port."""
_MESSAGE = struct.Struct("<IHH")


class Event(IntEnum):
    """Control events (virtio 1.2, 5.3.6.2)."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


@dataclass(frozen=True)
class ConsolePort:
    """One port. Consoles get a terminal in the guest (/dev/hvc0); others are plain byte streams, which Linux finds
    under their name in /dev/virtio-ports."""

    terminal: ConsoleTerminal
    name: str = ""
    console: bool = True


@dataclass
class _State:
    """How far the driver is with a port."""

    ready: bool = False
    opened: bool = False


class Console(QueueDevice):
    """A console with one port for each terminal; `ConsolePort` where a terminal is not enough. More than one port, or
    one that is not a nameless console, is only there for drivers with MULTIPORT.

    Raises ValueError for no port, or too many.
    """

    device_id = DeviceType.CONSOLE
    protocol_features = QueueDevice.protocol_features | ProtocolFeature.CONFIG
    config_size = 12

    def __init__(self, *ports: ConsoleTerminal | ConsolePort) -> None:
        super().__init__()
        self._seldom = Seldom()
        self.ports: Sequence[ConsolePort] = [
            port if isinstance(port, ConsolePort) else ConsolePort(port) for port in ports
        ]
        if not 1 <= len(self.ports) <= PORTS_MAX:
            raise ValueError(f"{len(self.ports)} ports: 1 to {PORTS_MAX} are possible")
        several = len(self.ports) > 1 or self.ports[0].name or not self.ports[0].console
        self.features = QueueDevice.features | ConsoleFeature.SIZE | ConsoleFeature.EMERG_WRITE
        self.queue_count = 2
        if several:
            self.features |= ConsoleFeature.MULTIPORT
            self.queue_count = 2 * (len(self.ports) + 1)
        self._receiving = {receive_queue(number): number for number in range(len(self.ports))}
        self._transmitting = {queue + 1: number for queue, number in self._receiving.items()}
        self.pulled_queues = frozenset({*self._receiving, CONTROL_RECEIVE, CONTROL_TRANSMIT})
        self._states = [_State() for _ in self.ports]
        self._answers: deque[bytes] = deque()
        for number, port in enumerate(self.ports):
            port.terminal.on_input = functools.partial(self._feed, number)
            port.terminal.on_resize = functools.partial(self._resized, number)

    @property
    def multiport(self) -> bool:
        """Whether the driver knows about ports."""
        return bool(self.negotiated & ConsoleFeature.MULTIPORT)

    # Bytes.

    def handle(self, queue: int, chain: Chain) -> None:
        port = self.ports[self._transmitting[queue]]
        if data := chain.read(0, OUTPUT_MAX):
            port.terminal.output(data)

    def chains_waiting(self, queue: int) -> None:
        if queue in self._receiving:
            self._feed(self._receiving[queue])
        else:
            self._control()

    def _feed(self, number: int) -> None:
        """Gives the guest what was typed, as far as it has room."""
        terminal = self.ports[number].terminal
        if self.multiport and not self._states[number].opened:
            return
        while terminal.input_waiting and (chain := self.take(receive_queue(number))) is not None:
            chain.write(terminal.take_input(min(chain.writable_len, INPUT_PART)))
            self.give(receive_queue(number), chain)

    # Control messages.

    def _control(self) -> None:
        """Listens and answers, in turns, as long as there is room for the answers."""
        while self._send_answers() and (chain := self.take(CONTROL_TRANSMIT)) is not None:
            message = chain.read(0, _MESSAGE.size)
            self.give(CONTROL_TRANSMIT, chain)
            if len(message) == _MESSAGE.size:
                self._message(*_MESSAGE.unpack(message))
        self._send_answers()

    def _send_answers(self) -> bool:
        """Whether there is room for more."""
        while self._answers and (chain := self.take(CONTROL_RECEIVE)) is not None:
            answer = self._answers.popleft()
            if len(answer) <= chain.writable_len:
                chain.write(answer)
            self.give(CONTROL_RECEIVE, chain)
        return len(self._answers) < ANSWERS_MAX + 4 * len(self.ports)

    def _message(self, number: int, event: int, value: int) -> None:
        if event == Event.DEVICE_READY:
            # A driver that begins has opened nothing. A front-end may not say that another one has (QEMU).
            self._states = [_State() for _ in self.ports]
            if value == 1:
                for index in range(len(self.ports)):
                    self._tell(index, Event.DEVICE_ADD)
            else:
                self._warn("device", "console: the driver says that it cannot work with this device")
            return
        if number >= len(self.ports):
            return
        port, state = self.ports[number], self._states[number]
        if event == Event.PORT_READY:
            state.ready = value == 1
            if not state.ready:
                self._warn("port", f"console: the driver says that it cannot work with port {number}")
                return
            if port.console:
                self._tell(number, Event.CONSOLE_PORT, 1)
                self._tell_size(number)
            if port.name:
                self._tell(number, Event.PORT_NAME, 1, port.name.encode())
            self._tell(number, Event.PORT_OPEN, 1)
        elif event == Event.PORT_OPEN:
            state.opened = value == 1
            self._feed(number)

    def _tell(self, number: int, event: Event, value: int = 0, more: bytes = b"") -> None:
        self._answers.append(_MESSAGE.pack(number, event, value) + more)

    def _tell_size(self, number: int) -> None:
        """Rows first: virtio 1.2, 5.3.6.2, has columns first, but every Linux since 2010 reads it this way round, and
        no other driver that we know reads it at all."""
        columns, rows = self.ports[number].terminal.size
        if columns and rows:
            self._tell(number, Event.RESIZE, 0, struct.pack("<HH", rows, columns))

    # Configuration.

    def _resized(self, number: int) -> None:
        if not self.multiport:
            if number == 0:
                self.config_changed()
        elif self._states[number].ready and self.ports[number].console:
            if self._send_answers():
                self._tell_size(number)
            self._send_answers()

    def read_config(self, offset: int, size: int) -> bytes:
        columns, rows = self.ports[0].terminal.size
        space = ConsoleConfig(columns, rows, max_nr_ports=len(self.ports)).pack()
        return space[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        """An emergency write: one byte to port 0, from a driver that has not got so far as to have queues."""
        if not offset <= EMERGENCY_WRITE < offset + len(data):
            raise ValueError(
                f"{len(data)} bytes at {offset} of a console's configuration are not the driver's to write"
            )
        self.ports[0].terminal.output(data[EMERGENCY_WRITE - offset :][:1])

    def _warn(self, kind: str, text: str) -> None:
        if said := self._seldom.text(kind, text):
            log.warning("%s", said)

    # Life.

    def set_features(self, features: int) -> None:
        super().set_features(features)
        if not self.multiport:
            self._forget()

    def reset(self) -> None:
        super().reset()
        self._forget()

    def disconnected(self, reason: str) -> None:
        super().disconnected(reason)
        self._forget()

    def _forget(self) -> None:
        self._states = [_State() for _ in self.ports]
        self._answers.clear()

    def save(self, fds: Fds) -> dict[str, Any]:
        ports = [[state.ready, state.opened] for state in self._states]
        return super().save(fds) | {"ports": ports, "answers": [answer.hex() for answer in self._answers]}

    def restore(self, data: dict[str, Any], fds: Fds) -> None:
        super().restore(data, fds)
        for state, (ready, opened) in zip(self._states, data.get("ports", ()), strict=False):
            state.ready, state.opened = bool(ready), bool(opened)
        self._answers = deque(bytes.fromhex(answer) for answer in data.get("answers", ()))


def receive_queue(number: int) -> int:
    """The queue on which the guest reads from a port; the next one is that on which it writes (virtio 1.2, 5.3.2)."""
    return 0 if number == 0 else 2 * number + 2
