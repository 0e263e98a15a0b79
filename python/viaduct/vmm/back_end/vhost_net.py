"""A network card whose queues the host's kernel serves: vhost-net (linux/vhost.h).

The kernel gets the rings' addresses in this process, the two eventfds of each queue, and a tap interface's descriptor;
from then on frames pass between the interface and the guest's memory on a thread of the kernel, without a system call
of ours. It speaks of a queue by its number within its own device: 0 receives, 1 transmits. Each pair of queues is a
device of its own, with a queue of the interface; a pair that the driver does not use is detached from that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from viaduct.switch.tap_interface import attach_queue, explain, open_queue, set_header, set_offloads, set_up
from viaduct.vhost_user.device import Vring
from viaduct.virtio.features import DeviceFeature, DeviceType, NetFeature
from viaduct.virtio.net_config import NetConfig
from viaduct.vmm.back_end.back_end import BackEnd
from viaduct.vmm.errors import MachineError
from viaduct.vmm.ram import Ram

# linux/vhost.h
VHOST_GET_FEATURES = 0x8008AF00
VHOST_SET_FEATURES = 0x4008AF00
VHOST_SET_OWNER = 0x0000AF01
VHOST_SET_MEM_TABLE = 0x4008AF03
VHOST_SET_VRING_NUM = 0x4008AF10
VHOST_SET_VRING_ADDR = 0x4028AF11
VHOST_SET_VRING_BASE = 0x4008AF12
VHOST_GET_VRING_BASE = 0xC008AF12
VHOST_SET_VRING_KICK = 0x4008AF20
VHOST_SET_VRING_CALL = 0x4008AF21
VHOST_NET_SET_BACKEND = 0x4008AF30

DEVICE = "/dev/vhost-net"

_WANTED = (
    DeviceFeature.VERSION_1
    | DeviceFeature.ANY_LAYOUT
    | DeviceFeature.INDIRECT_DESC
    | DeviceFeature.EVENT_IDX
    | NetFeature.MRG_RXBUF
)
"""Of what the kernel offers. The others are the machine's business or the host's memory's."""
_ACCEPTED = {
    "csum": NetFeature.GUEST_CSUM,
    "tso4": NetFeature.GUEST_TSO4,
    "tso6": NetFeature.GUEST_TSO6,
    "ecn": NetFeature.GUEST_ECN,
}
_BY_INTERFACE = (
    NetFeature.CSUM
    | NetFeature.GUEST_CSUM
    | NetFeature.HOST_TSO4
    | NetFeature.HOST_TSO6
    | NetFeature.HOST_ECN
    | NetFeature.GUEST_TSO4
    | NetFeature.GUEST_TSO6
    | NetFeature.GUEST_ECN
)
"""What the tap interface does, not vhost-net: the header goes through it untouched."""


class _Pair(NamedTuple):
    """Descriptors of one pair of queues."""

    device: int
    tap: int

    def call(self, request: int, argument: bytes | bytearray | int) -> None:
        fcntl.ioctl(self.device, request, argument)


class VhostNetBackEnd(BackEnd):
    """The tap interface `ifname`, made unless it exists, and vhost-net on it. `mac` is the guest's, 6 bytes."""

    device_id = int(DeviceType.NET)

    def __init__(self, ifname: str, mac: bytes, pairs: int = 1) -> None:
        self.ifname = ifname
        self.features = 0
        self.queue_sizes = (256, 256) * pairs
        self.config = NetConfig(mac=mac).pack()
        self._fds = contextlib.ExitStack()
        self._pairs: list[_Pair] = []
        self._wanted = pairs
        self._detached: set[_Pair] = set()
        self._ram: Ram | None = None
        self._running: list[int] = []

    async def open(self, ram: Ram) -> None:
        self._ram = ram
        multiple = self._wanted > 1
        for _ in range(self._wanted):
            try:
                device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                await self.close()
                raise MachineError(f"{DEVICE}: {_advice(error)}") from error
            self._fds.callback(os.close, device)
            try:
                tap = open_queue(self.ifname, multiple=multiple)
                self._fds.callback(os.close, tap)
                set_up(self.ifname)
            except OSError as error:
                await self.close()
                raise MachineError(explain(self.ifname, error, multiple=multiple)) from error
            self._pairs.append(_Pair(device, tap))
        try:
            for pair in self._pairs:
                pair.call(VHOST_SET_OWNER, 0)
            answer = bytearray(8)
            self._pairs[0].call(VHOST_GET_FEATURES, answer)
        except OSError as error:
            await self.close()
            raise MachineError(f"{DEVICE}: {error.strerror}") from error
        offered = int.from_bytes(answer, "little") & _WANTED
        self.features = offered | int(_BY_INTERFACE | NetFeature.MAC | NetFeature.STATUS)

    async def activate(self, features: int, queues: Sequence[Vring]) -> None:
        assert self._ram is not None
        try:
            tap = self._pairs[0].tap  # these are the interface's, whichever queue is asked
            set_header(tap, 12 if features & (DeviceFeature.VERSION_1 | NetFeature.MRG_RXBUF) else 10)
            set_offloads(tap, [name for name, bit in _ACCEPTED.items() if features & bit])
            places = self._ram.memory.places
            regions = b"".join(struct.pack("<QQQQ", guest, size, here, 0) for guest, size, here in places)
            for number in sorted({vring.index // 2 for vring in queues}):
                self._pairs[number].call(VHOST_SET_FEATURES, struct.pack("<Q", features & _WANTED))
                self._pairs[number].call(VHOST_SET_MEM_TABLE, struct.pack("<II", len(places), 0) + regions)
            for vring in queues:
                self._start(vring)
            self._attach(frozenset(range(len(self.queue_sizes))) - self.disabled, self.disabled)
            for vring in queues:
                pair = self._pairs[vring.index // 2]
                pair.call(VHOST_NET_SET_BACKEND, struct.pack("<Ii", vring.index % 2, pair.tap))
                self._running.append(vring.index)
        except OSError as error:
            await self.deactivate()
            raise MachineError(f"vhost-net refused the queues of {self.ifname}: {error.strerror}") from error

    async def disable(self, queues: frozenset[int]) -> None:
        try:
            self._attach(self.disabled - queues, queues - self.disabled)
        except OSError as error:
            raise MachineError(f"{self.ifname}: a queue cannot be attached or detached: {error.strerror}") from error
        self.disabled = queues

    async def deactivate(self) -> Mapping[int, int]:
        bases = {}
        for index in self._running:
            pair = self._pairs[index // 2]
            # Without a back-end the kernel has finished what it had taken when this returns.
            pair.call(VHOST_NET_SET_BACKEND, struct.pack("<Ii", index % 2, -1))
            state = bytearray(struct.pack("<II", index % 2, 0))
            pair.call(VHOST_GET_VRING_BASE, state)
            bases[index] = int(struct.unpack("<II", state)[1])
        self._running.clear()
        return bases

    def reset(self) -> None:
        """Nothing is left after `deactivate`."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver may write no field of a network device's configuration (virtio 1.2, 5.1.4)."""

    async def close(self) -> None:
        await self.deactivate()
        self._pairs.clear()
        self._fds.close()

    def _attach(self, used: frozenset[int], unused: frozenset[int]) -> None:
        """Joins pairs to the interface or not, each by its receiving queue. Attached ones stay so."""
        for number, pair in enumerate(self._pairs):
            if 2 * number in unused and pair not in self._detached:
                attach_queue(pair.tap, False)
                self._detached.add(pair)
            elif 2 * number in used and pair in self._detached:
                attach_queue(pair.tap, True)
                self._detached.discard(pair)

    def _start(self, vring: Vring) -> None:
        pair, number = self._pairs[vring.index // 2], vring.index % 2
        pair.call(VHOST_SET_VRING_NUM, struct.pack("<II", number, vring.size))
        pair.call(VHOST_SET_VRING_BASE, struct.pack("<II", number, vring.base))
        # Sizes with the event fields, which are there whether they were negotiated or not (virtio 1.2, 2.7).
        descriptors = self._here(vring.descriptor_addr, 16 * vring.size)
        used = self._here(vring.device_addr, 6 + 8 * vring.size)
        available = self._here(vring.driver_addr, 6 + 2 * vring.size)
        pair.call(VHOST_SET_VRING_ADDR, struct.pack("<IIQQQQ", number, 0, descriptors, used, available, 0))
        for request, fd in ((VHOST_SET_VRING_KICK, vring.kick_fd), (VHOST_SET_VRING_CALL, vring.call_fd)):
            pair.call(request, struct.pack("<Ii", number, -1 if fd is None else fd))

    def _here(self, addr: int, size: int) -> int:
        """The address in this process of a piece of a ring. The kernel takes our word for it that all of it is the
        guest's: raises `OSError` unless it lies in one piece of memory."""
        assert self._ram is not None
        for guest, length, here in self._ram.memory.places:
            if guest <= addr and addr + size <= guest + length:
                return here + addr - guest
        raise OSError(errno.EFAULT, f"{size} bytes of a ring at {addr:#x} are not in the guest's memory")


def _advice(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "the kernel's vhost-net is not loaded; as root: modprobe vhost_net; or use path=virtio"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "this user may not open it; as root: usermod -aG kvm USER, then log in again; or use path=virtio"
    return str(error.strerror)
