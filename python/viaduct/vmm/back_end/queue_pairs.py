"""A network card with several queue pairs: one more queue, by which its driver says how many of them it uses.

# How it works

A back-end serves pairs of queues and knows of no other. The control queue behind them (virtio 1.2, 5.1.6.5) is the
machine's own, whoever serves the rest: a device of one queue in this process, which enables and disables pairs of the
back-end (5.1.6.5.6). After a reset the first pair is used and no other, so that a driver that has not asked for
more finds all frames there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from viaduct._core import Chain
from viaduct.vhost_user.device import Vring
from viaduct.vhost_user.queue_device import QueueDevice
from viaduct.virtio.features import DeviceType, NetFeature
from viaduct.virtio.net_config import NetConfig
from viaduct.vmm.back_end.back_end import BackEnd
from viaduct.vmm.back_end.in_process import InProcessBackEnd
from viaduct.vmm.errors import MachineError
from viaduct.vmm.ram import Ram

CONTROL_SIZE = 64
"""Descriptors of the control queue."""
OK, ERR = b"\0", b"\1"
MQ_PAIRS_SET = bytes([4, 0])
"""VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET."""
_PAIRS_SET_SIZE = len(MQ_PAIRS_SET) + 2
_OWN = NetFeature.MQ | NetFeature.CTRL_VQ


class QueuePairsBackEnd(BackEnd):
    """`inner` serves `pairs` pairs of queues, 2 or more, and this the control queue behind them."""

    def __init__(self, inner: BackEnd, pairs: int) -> None:
        self.pairs = pairs
        self.used = 1
        """Pairs that the driver uses now."""
        self.device_id = inner.device_id
        self.features = 0
        self.queue_sizes = ()
        self._inner = inner
        self._control = InProcessBackEnd(_Control(self))
        self._apply()

    @property
    def config(self) -> bytes:  # type: ignore[override]  # most of it is the inner one's
        """The configuration space, with the number of pairs."""
        return NetConfig.unpack(self._inner.config)._replace(max_queue_pairs=self.pairs).pack()

    async def open(self, ram: Ram) -> None:
        for part in (self._inner, self._control):
            part.on_config_change = self._config_changed
            part.on_failure = self._failed
            await part.open(ram)
        self.features = self._inner.features | int(_OWN)
        self.queue_sizes = (*self._inner.queue_sizes, CONTROL_SIZE)

    async def activate(self, features: int, queues: Sequence[Vring]) -> None:
        # Without MQ there is one pair, and the control queue is behind that (virtio 1.2, 5.1.2).
        behind = 2 * (self.pairs if features & NetFeature.MQ else 1)
        await self._inner.activate(features & self._inner.features, [vring for vring in queues if vring.index < behind])
        try:
            await self._control.activate(features & ~int(_OWN), [vring for vring in queues if vring.index == behind])
        except MachineError:
            await self._inner.deactivate()
            raise

    async def deactivate(self) -> Mapping[int, int]:
        # A command that is under way ends first: it is about the others.
        try:
            control = await self._control.deactivate()
        finally:
            pairs = await self._inner.deactivate()
        return {**pairs, **control}

    async def use(self, pairs: int) -> bool:
        """The driver wants to use so many pairs. Returns whether it may."""
        if not 1 <= pairs <= self.pairs:
            return False
        try:
            await self._inner.disable(frozenset(range(2 * pairs, 2 * self.pairs)))
        except MachineError as error:
            self._failed(str(error))
            return False
        self.used = pairs
        return True

    def reset(self) -> None:
        self.used = 1
        self._apply()
        self._control.reset()
        self._inner.reset()

    def write_config(self, offset: int, data: bytes) -> None:
        self._inner.write_config(offset, data)

    def save(self) -> dict[str, Any]:
        return {"used": self.used, "inner": self._inner.save(), "control": self._control.save()}

    def restore(self, data: dict[str, Any]) -> None:
        used = data.get("used")
        if not isinstance(used, int) or not 1 <= used <= self.pairs:
            raise ValueError(f"{used!r} queue pairs in use; this card has 1 to {self.pairs}")
        self._inner.restore(data.get("inner", {}))
        self._control.restore(data.get("control", {}))
        self.used = used
        self._apply()

    async def close(self) -> None:
        await self._control.close()
        await self._inner.close()

    def _apply(self) -> None:
        """Before the queues run."""
        self._inner.disabled = frozenset(range(2 * self.used, 2 * self.pairs))

    def _config_changed(self) -> None:
        if self.on_config_change is not None:
            self.on_config_change()

    def _failed(self, reason: str) -> None:
        if self.on_failure is not None:
            self.on_failure(reason)


class _Control(QueueDevice):
    """Answers commands (virtio 1.2, 5.1.6.5): class and command, what belongs to it, and room for one byte."""

    device_id = DeviceType.NET
    queue_size = CONTROL_SIZE

    def __init__(self, card: QueuePairsBackEnd) -> None:
        super().__init__()
        self._card = card

    async def handle(self, queue: int, chain: Chain) -> None:
        # The driver may say that it is of any length.
        command = chain.read(0, _PAIRS_SET_SIZE) if chain.readable_len == _PAIRS_SET_SIZE else b""
        known = command.startswith(MQ_PAIRS_SET)
        done = known and await self._card.use(int.from_bytes(command[len(MQ_PAIRS_SET) :], "little"))
        chain.write(OK if done else ERR)
