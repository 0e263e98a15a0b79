"""What TCP streams are measured over: two guests with a switch between, or a guest and the host's kernel.

A road has two ends. The far end is always a Linux guest in QEMU that serves `stream`; the near end is another guest, or
the kernel of a network namespace, which has an interface into the switch: a tap of the switch's own, or one of DPDK's
net_tap driver, or Open vSwitch's local port; or the switch is the kernel's bridge and QEMU itself serves the guest's
tap.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, Self

import msgspec

from bench import programs
from bench.backend import BackEnd
from bench.linux_guest import LinuxGuest, tap, vhost_user
from bench.namespace import Namespace
from bench.ovs import Ovs
from bench.process import Program, ProgramError
from bench.testpmd import Testpmd
from bench.viaduct import AdaptiveViaduct

NEAR, FAR, PORT = "10.0.0.1", "10.0.0.2", 5001
_ANSWER_S = 30


class Streamed(msgspec.Struct, frozen=True):
    """What `stream send` reports: bytes, and seconds until the last of them was counted at the far end."""

    seconds: float
    sent: int
    received: int
    compared: int
    damaged: int


class OvsSegments(Ovs):
    """Open vSwitch that carries TCP segments of up to 64 KB as one, which it does only on ports that connect."""

    name = "ovs-tso"
    title = "OVS-DPDK, userspace TSO"
    connects = True
    settings = ("other_config:userspace-tso-enable=true",)


class _Tapped:
    """A back-end of which the first port is an interface of the namespace it is started in."""

    interface: ClassVar[str] = "bench0"


class TapViaduct(_Tapped, AdaptiveViaduct):
    title, ports = "Viaduct, tap", 1

    def start(self, options: Sequence[str] = ()) -> None:
        super().start(["--port", f"host=tap:{self.interface}", *options])


class TapTestpmd(_Tapped, Testpmd):
    name, title, ports = "testpmd", "testpmd io, net_tap", 1

    devices = (f"net_tap0,iface={_Tapped.interface}",)


class LocalOvs(_Tapped, Ovs):
    """The host's end is the bridge's own port, a tap that Open vSwitch reads and writes with system calls.

    DPDK's net_tap is no alternative with its two queues: not every kernel has the queueing disciplines for that.
    """

    title, ports = "OVS-DPDK, local port", 1
    interface = "bench"


class LocalOvsSegments(_Tapped, OvsSegments):
    """The same with userspace TSO."""

    title, ports = "OVS-DPDK, userspace TSO, local port", 1
    interface = "bench"


class Road(ABC):
    """Everything between and including the two ends. `start` returns at once, `open` waits until streams pass."""

    def __init__(self, directory: Path, cpu: int) -> None:
        self.directory = directory
        self.cpu = cpu
        self.guests: list[LinuxGuest] = []
        self.backend: BackEnd | None = None
        self._stack = ExitStack()

    name: str
    title: str

    @abstractmethod
    def start(self) -> None:
        """Start the switch and the guests' boot."""

    @abstractmethod
    def _send(self, seconds: float, cpus: set[int]) -> str:
        """Run `stream send` at the near end."""

    def open(self) -> None:
        """Wait for the guests, and until a first short stream has passed. Raises ProgramError."""
        for guest in self.guests:
            guest.ready()
        far = self.guests[-1]
        far.run(f"stream serve {PORT} >/dev/null 2>&1 & until grep -q ':{PORT:04X} ' /proc/net/tcp; do :; done")
        self._meet()
        self.send(0.2, os.sched_getaffinity(0))

    @abstractmethod
    def _meet(self) -> None:
        """Wait until the near end reaches the far one."""

    def send(self, seconds: float, cpus: set[int]) -> Streamed:
        """A stream of so many seconds from the near end to the far one, with both ends on these CPUs only."""
        for guest in self.guests:
            guest.confine(cpus)
        return msgspec.json.decode(self._send(seconds, cpus), type=Streamed)

    def programs(self) -> list[Program]:
        """All processes that take part."""
        return [*(guest.program() for guest in self.guests), *([self.backend.program()] if self.backend else [])]

    def pause(self) -> None:
        for program in self.programs():
            program.pause()

    def resume(self) -> None:
        for program in reversed(self.programs()):
            program.resume()

    def _start_guest(self, name: str, network: list[str], address: str, launcher: Sequence[str] = ()) -> None:
        guest = LinuxGuest(name, self.directory, network, address, launcher)
        self._stack.enter_context(guest)
        guest.start()
        self.guests.append(guest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class GuestRoad(Road):
    """From a guest to a guest through a back-end with two ports."""

    def __init__(self, directory: Path, cpu: int, kind: type[BackEnd]) -> None:
        super().__init__(directory, cpu)
        self.name, self.title = kind.name, kind.title
        self._switch = kind(directory, cpu)

    def start(self) -> None:
        self.backend = self._stack.enter_context(self._switch)
        self.backend.start()
        self.backend.settle()
        for index, (socket, address) in enumerate(zip(self.backend.sockets, (NEAR, FAR), strict=True)):
            network = vhost_user(socket, f"02:00:00:00:02:{index:02x}", server=self.backend.connects)
            self._start_guest(f"guest{index}", network, address)

    def _meet(self) -> None:
        self.guests[0].reaches(FAR)

    def _send(self, seconds: float, cpus: set[int]) -> str:
        return self.guests[0].run(f"stream send {FAR} {PORT} {seconds}", seconds + _ANSWER_S)


class _HostRoad(Road):
    """From the kernel of a namespace."""

    _namespace: Namespace

    def start(self) -> None:
        self._namespace = self._stack.enter_context(Namespace())

    def _meet(self) -> None:
        deadline = time.monotonic() + _ANSWER_S
        while True:
            try:
                self._namespace.run("ping", "-c", "1", "-W", "1", FAR)
                return
            except ProgramError:
                if time.monotonic() > deadline:
                    raise

    def _send(self, seconds: float, cpus: set[int]) -> str:
        pinned = ("taskset", "--cpu-list", ",".join(map(str, cpus)))
        sender = (str(programs.stream()), "send", FAR, str(PORT), str(seconds))
        return self._namespace.run(*pinned, *sender, timeout=seconds + _ANSWER_S)

    def _address(self, interface: str) -> None:
        # A switch may make its interface again when it has read all its configuration.
        deadline = time.monotonic() + _ANSWER_S
        while True:
            self._namespace.wait_for_interface(interface)
            try:
                self._namespace.run("ip", "addr", "replace", f"{NEAR}/24", "dev", interface)
                self._namespace.run("ip", "link", "set", interface, "up")
                time.sleep(0.3)
                if NEAR in self._namespace.run("ip", "addr", "show", "dev", interface):
                    return
            except ProgramError:
                if time.monotonic() > deadline:
                    raise


class TapRoad(_HostRoad):
    """Through a back-end with an interface in the namespace and one vhost-user port."""

    def __init__(self, directory: Path, cpu: int, kind: type[BackEnd], interface: str) -> None:
        super().__init__(directory, cpu)
        self.name, self.title = kind.name, kind.title
        self._switch = kind(directory, cpu)
        self._interface = interface

    def start(self) -> None:
        super().start()
        self._switch.launcher = self._namespace.enter
        self.backend = self._stack.enter_context(self._switch)
        self.backend.start()
        self.backend.settle()
        network = vhost_user(self.backend.sockets[0], "02:00:00:00:02:00", server=self.backend.connects)
        self._start_guest("guest", network, FAR)
        self._address(self._interface)


class BridgeRoad(_HostRoad):
    """Through the kernel's bridge to a tap that QEMU reads and writes (no vhost-net: not every host has it)."""

    name, title = "bridge", "kernel bridge, QEMU's tap"

    def start(self) -> None:
        super().start()
        for command in (
            "ip tuntap add bench1 mode tap vnet_hdr",
            "ip link set bench1 up",
            "busybox brctl addbr bench0",
            "busybox brctl addif bench0 bench1",
        ):
            self._namespace.run(*command.split())
        self._start_guest("guest", tap("bench1", "02:00:00:00:02:00"), FAR, self._namespace.enter)
        self._address("bench0")


def between_guests(directory: Path, cpu: int, name: str) -> Road:
    """One of GUEST_ROADS by its name."""
    return GuestRoad(directory, cpu, GUEST_ROADS[name])


GUEST_ROADS: dict[str, type[BackEnd]] = {kind.name: kind for kind in (Ovs, OvsSegments, AdaptiveViaduct)}
_TAPS: tuple[type[TapTestpmd] | type[LocalOvs] | type[LocalOvsSegments] | type[TapViaduct], ...] = (
    TapTestpmd,
    LocalOvs,
    LocalOvsSegments,
    TapViaduct,
)
TAP_ROADS = (*(kind.name for kind in _TAPS), BridgeRoad.name)


def from_host(directory: Path, cpu: int, name: str) -> Road:
    """One of TAP_ROADS by its name."""
    if name == BridgeRoad.name:
        return BridgeRoad(directory, cpu)
    kind = next(kind for kind in _TAPS if kind.name == name)
    return TapRoad(directory, cpu, kind, kind.interface)
