"""A device in another process: a vhost-user back-end behind a UNIX socket.

# How it works

`open` connects and learns what the device offers. `activate` shares the machine's memory and starts the rings there.
When the back-end dies, or its switch is restarted, the guest notices nothing but silence: this connects again until
somebody answers, and starts the rings where they stand - a split ring by its used index, a packed one where the device
finds it, and both by the record of requests in flight if the back-end keeps one (INFLIGHT_SHMFD). Then every queue's
driver is notified once, because the last back-end may have died before it did.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Mapping, Sequence

from viaduct.devices.seldom import Seldom
from viaduct.vhost_user import payloads as p
from viaduct.vhost_user.connection import WANTED_PROTOCOL, Connection, InflightKeeper
from viaduct.vhost_user.device import Vring
from viaduct.vhost_user.errors import VhostUserError
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.vhost_user.ring import PACKED_START
from viaduct.virtio.features import DeviceFeature, DeviceType
from viaduct.virtio.status import Status
from viaduct.vmm.back_end.back_end import BackEnd
from viaduct.vmm.errors import MachineError
from viaduct.vmm.ram import Ram

log = logging.getLogger("viaduct.vmm")

CONNECT_TIMEOUT = 5.0
"""Seconds in which the back-end has to appear when a machine starts."""
_FIRST_RETRY, _LAST_RETRY = 0.05, 0.25
_NOT_FOR_DRIVERS = DeviceFeature.LOG_ALL | DeviceFeature.ACCESS_PLATFORM


class VhostUserBackEnd(BackEnd):
    """The device behind the socket `path`, of which a machine knows the kind and how many queues it wants.

    `config` is the configuration space if the machine keeps it itself; None: the back-end is asked for `config_size`
    bytes. `adds` are features that the machine sees to (a MAC address), `hides` those that it does not want.
    """

    def __init__(
        self,
        path: str,
        device_id: int,
        queue_sizes: Sequence[int],
        *,
        config: bytes | None = None,
        config_size: int = 0,
        adds: int = 0,
        hides: int = 0,
    ) -> None:
        self.path = path
        self.device_id = device_id
        self.features = 0
        self.queue_sizes = tuple(queue_sizes)
        self.config = config or b""
        self._asks_config = config is None and config_size > 0
        self._config_size = config_size
        self._adds, self._hides = int(adds), int(hides) | int(_NOT_FOR_DRIVERS)
        self._connection = Connection(
            path,
            device_id=device_id,
            protocol_features=WANTED_PROTOCOL | ProtocolFeature.INFLIGHT_SHMFD,
            queue_count=len(self.queue_sizes),
        )
        self._connection.on_config_change = self._config_changed
        self._inflight = InflightKeeper()
        self._seldom = Seldom()
        self._ram: Ram | None = None
        self._features = 0
        self._queues: tuple[Vring, ...] = ()
        self._has_memory = False
        self._turn = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self, ram: Ram) -> None:
        self._ram = ram
        connection = self._connection
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await connection.connect()
                await connection.negotiate()
                await connection.check_queue_count()
                if self._asks_config:
                    await self._read_config()
        except TimeoutError:
            await connection.end()
            raise MachineError(
                f"{self.path}: nobody listens there after {CONNECT_TIMEOUT:g} s; start the back-end first, for example "
                f"`viaduct switch --port vm1=vhost-user:{self.path}`"
            ) from None
        except VhostUserError as error:
            await connection.end()
            raise MachineError(str(error)) from error
        except BaseException:
            await connection.end()
            raise
        self.features = connection.offered & ~self._hides | self._adds
        self._watch = asyncio.create_task(self._keep_up(), name=f"vhost-user back-end {self.path}")

    async def activate(self, features: int, queues: Sequence[Vring]) -> None:
        async with self._turn:
            self._features = features & ~self._adds
            self._queues = tuple(queues)
            self._inflight.drop()
            if not self._connection.connected:
                return  # Whoever comes back will be told.
            try:
                await self._start([vring.base for vring in queues])
            except VhostUserError as error:
                if not self._connection.connected:
                    return  # The same.
                self._queues = ()
                raise MachineError(str(error)) from error

    async def deactivate(self) -> Mapping[int, int]:
        async with self._turn:
            queues, self._queues = self._queues, ()
            if not queues:
                return {}
            connection = self._connection
            if not connection.connected:
                return self._positions(queues)
            try:
                bases = {vring.index: await connection.stop_ring(vring.index) for vring in queues}
                if ProtocolFeature.STATUS in connection.protocol_features:
                    await connection.request("SET_STATUS", p.U64(0))
            except VhostUserError:
                return self._positions(queues)
            return bases

    async def disable(self, queues: frozenset[int]) -> None:
        async with self._turn:
            before, self.disabled = self.disabled, queues
            connection = self._connection
            if not (connection.connected and connection.has_protocol_features):
                return  # Whoever comes back will be told; and without the protocol's features all rings are enabled.
            try:
                for vring in self._queues:
                    if (vring.index in before) != (vring.index in queues):
                        await connection.enable(vring.index, vring.index not in queues)
            except VhostUserError as error:
                if connection.connected:
                    raise MachineError(str(error)) from error

    def reset(self) -> None:
        self._features = 0

    def write_config(self, offset: int, data: bytes) -> None:
        if said := self._seldom.text("config", f"the driver's write to its configuration at {offset} was ignored"):
            log.warning("%s: %s", self.path, said)

    async def close(self) -> None:
        for task in (self._watch, self._reading):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._watch = self._reading = None
        await self.deactivate()
        await self._connection.end()
        self._inflight.drop()

    async def _start(self, bases: Sequence[int]) -> None:
        connection, ram = self._connection, self._ram
        assert ram is not None
        connection.require(self._features)
        await connection.set_features(self._features)
        if not self._has_memory:
            await self._share_memory(ram)
        await self._inflight.share(connection, [vring.size for vring in self._queues])
        for vring in self._queues:
            if vring.call_fd is not None:
                await connection.request("SET_VRING_CALL", p.VringFd(vring.index), [vring.call_fd])
        # Enabled before they start: what a driver sends through a disabled ring is discarded ("Ring states").
        if connection.has_protocol_features:
            for vring in self._queues:
                await connection.enable(vring.index, vring.index not in self.disabled)
        for vring, base in zip(self._queues, bases, strict=True):
            assert vring.kick_fd is not None
            place = p.VringAddr(vring.index, 0, vring.descriptor_addr, vring.device_addr, vring.driver_addr, 0)
            await connection.start_ring(vring.size, base, place, vring.kick_fd)
        await connection.add_status(Status.DRIVER_OK)
        await connection.request("GET_FEATURES")  # Without REPLY_ACK, the answer says that all before was carried out.

    async def _share_memory(self, ram: Ram) -> None:
        connection = self._connection
        assert ram.fd is not None, "a machine with such a device shares its memory (MachineConfig.shares_memory)"
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in connection.protocol_features:
            for region in ram.regions:
                await connection.request("ADD_MEM_REG", region, [ram.fd])
        else:
            await connection.request("SET_MEM_TABLE", p.Regions(ram.regions), [ram.fd] * len(ram.regions))
        self._has_memory = True

    async def _keep_up(self) -> None:
        """Connects again whenever the back-end has gone."""
        connection = self._connection
        while True:
            await connection.lost.wait()
            log.warning("%s: back-end lost (%s); waiting for it", self.path, connection.lost_reason)
            delay = _FIRST_RETRY
            while not connection.connected:
                try:
                    await connection.connect()
                    async with self._turn:
                        await self._resume()
                except (VhostUserError, OSError) as error:
                    log.warning("%s: %s; trying again", self.path, error)
                    await connection.disconnect("the start failed")
                    await asyncio.sleep(delay * random.uniform(0.8, 1.2))
                    delay = min(2 * delay, _LAST_RETRY)
            log.warning("%s: back-end is back", self.path)

    async def _resume(self) -> None:
        connection = self._connection
        self._has_memory = False
        await connection.negotiate()
        await connection.check_queue_count()
        if not self._queues:
            return
        await self._start(list(self._positions(self._queues).values()))
        for vring in self._queues:
            if vring.call_fd is not None:
                os.eventfd_write(vring.call_fd, 1)

    def _positions(self, queues: Sequence[Vring]) -> dict[int, int]:
        """Where the queues stand as far as the memory tells: a packed ring's device finds out by itself."""
        assert self._ram is not None
        packed = self._features & DeviceFeature.RING_PACKED
        positions = {}
        for vring in queues:
            if packed:
                positions[vring.index] = PACKED_START
                continue
            try:
                # `idx` of the used ring (virtio 1.2, 2.7.8).
                used = self._ram.memory.read(vring.device_addr + 2, 2)
                positions[vring.index] = int.from_bytes(used, "little")
            except ValueError:  # There is no memory: whoever serves the ring will say so.
                positions[vring.index] = vring.base
        return positions

    def _config_changed(self) -> None:
        if self._asks_config:
            self._reading = asyncio.create_task(self._read_again())

    async def _read_again(self) -> None:
        try:
            await self._read_config()
        except VhostUserError as error:
            log.warning("%s: its configuration has changed, but: %s", self.path, error)
            return
        if self.on_config_change is not None:
            self.on_config_change()

    async def _read_config(self) -> None:
        if ProtocolFeature.CONFIG not in self._connection.protocol_features:
            name = DeviceType(self.device_id).name.lower()
            raise self._connection.error(f"it has no configuration space to show, which a {name} device needs (CONFIG)")
        self.config = await self._connection.read_config(0, self._config_size)
