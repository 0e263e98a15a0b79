"""The Rust half of Viaduct: packets, rings and guest memory. Decisions are made in Python."""

from collections.abc import Sequence
from typing import Any, Literal, final

from viaduct._core_block import BlockDevice as BlockDevice
from viaduct._core_block import ImageError as ImageError
from viaduct._core_e1000 import E1000 as E1000
from viaduct._core_platform import I8042 as I8042
from viaduct._core_platform import DebugExit as DebugExit
from viaduct._core_platform import Pvpanic as Pvpanic
from viaduct._core_platform import ResetControl as ResetControl
from viaduct._core_platform import Rtc as Rtc
from viaduct._core_platform import Serial as Serial
from viaduct._core_platform import SleepControl as SleepControl
from viaduct._core_vmm import BusDevice as BusDevice
from viaduct._core_vmm import PciFunction as PciFunction
from viaduct._core_vmm import PciRoot as PciRoot
from viaduct._core_vmm import VirtioMmio as VirtioMmio
from viaduct._core_vmm import VirtioPci as VirtioPci
from viaduct._core_vmm import Vm as Vm

VERSION: str

@final
class GuestMemory:
    """An immutable table of memory regions that another process shares with us."""

    def __new__(cls) -> GuestMemory: ...
    def with_region(
        self, guest_addr: int, size: int, user_addr: int, mmap_offset: int, fd: int | None, private: bool = False
    ) -> GuestMemory:
        """This memory and a region mapped from `fd`, which stays the caller's; None: zeroes that nobody else can see,
        in huge pages where the system has them. `private`: the file only gives the first content, page by page as
        these are touched; what is written nobody else sees.

        Raises ValueError where the region is empty, overlaps another, overflows or exceeds its file.
        """
    def without_region(self, guest_addr: int, size: int, user_addr: int) -> GuestMemory:
        """This memory without the region of exactly these values. Raises ValueError if there is none."""
    def with_log(self, log: DirtyLog | None) -> GuestMemory:
        """This memory, of which `log` is told what is written by `write` and by device queues; None: no log.

        Raises ValueError where the log has no bits for the end of a region.
        """
    def behind(self, iotlb: Iotlb) -> GuestMemory:
        """This memory as a device behind an IOMMU reaches it: by I/O virtual addresses."""
    def read(self, addr: int, len: int) -> bytes:
        """The bytes at a guest-physical address. Raises ValueError where they are not all in regions."""
    def write(self, addr: int, data: bytes) -> None:
        """Changes the bytes at a guest-physical address. Raises ValueError where they are not all in regions."""
    def discard(self, addr: int, len: int) -> int:
        """Gives the whole pages in a range of guest-physical addresses back to the system: they read as zeroes until
        they are written again. Returns the bytes. Raises ValueError where the range is not all in regions, OSError
        where their file does not allow it (it is sealed against writes, or no file in memory, or private)."""
    @property
    def regions(self) -> list[tuple[int, int, int, int]]:
        """Guest address, size, user address and file offset of each region, by guest address."""
    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Guest address, size and address in this process of each region, by guest address: for the host's kernel,
        which asks for them so (linux/vhost.h)."""

    @property
    def faulted(self) -> bool:
        """Whether the file behind a region became shorter under us: it reads as zeroes there."""

@final
class DirtyLog:
    """A bitmap of written pages in `size` bytes of a file, one bit for each 4096 bytes (vhost-user, "Migration").

    `event_fd` is an eventfd that is told when pages have been marked. Both descriptors stay the caller's. Raises
    ValueError if the file is too short or of a kind that cannot be mapped.
    """

    def __new__(cls, fd: int, size: int, offset: int = 0, event_fd: int | None = None) -> DirtyLog: ...
    def covers(self, addr: int, len: int) -> bool:
        """Whether each page of a guest-physical range has a bit."""

def signal_call(fd: int) -> bool:
    """Signals an eventfd or a pipe that belongs to a peer as well. Never waits, even if the peer filled it and made it
    block. Returns whether the peer can see it; raises OSError for a pipe that cannot be written."""

@final
class Iotlb:
    """What an IOMMU lets a device reach (vhost-user, "IOMMU support"). `event_fd` is written when there is something to
    take; permissions are 1 read, 2 write, 3 both."""

    def __new__(cls, event_fd: int) -> Iotlb: ...
    def update(self, iova: int, size: int, user_addr: int, permissions: int) -> tuple[int, int] | None:
        """Takes over a translation. Returns the first and last address of which something else was known: it has to be
        treated as invalidated. Raises ValueError for a range or permissions that cannot be."""
    def invalidate(self, iova: int, size: int) -> tuple[int, int]:
        """Forgets a range, all there is for size 0. Returns its first and last address."""
    def refuse(self, iova: int, write: bool) -> bool:
        """There is no translation for a page that was missed. Returns whether it was still waited for."""
    def forget_refusals(self) -> None:
        """Everybody who waited has been told what was refused."""
    def take_misses(self) -> list[tuple[int, bool]]:
        """New misses: address of the page, and whether it is to be written."""
    def take_forbidden(self) -> list[tuple[int, bool]]:
        """Accesses that permissions forbade, likewise."""
    @property
    def translations(self) -> list[tuple[int, int, int, int]]:
        """What is known: address, size, user address and permissions of each range, as `update` takes them."""
    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Ranges known now; updates, invalidations, misses and refused misses so far."""

class TranslationMissing(ValueError):
    """A ring's I/O virtual addresses are not known yet; they have been asked for."""

class RingError(ValueError):
    """A virtqueue that breaks the rules: what was found, what is allowed, the section of virtio 1.2."""

def ring_parts(layout: Literal["split", "packed"], size: int, *, event_idx: bool = True) -> list[tuple[int, int]]:
    """Size and alignment in bytes of a queue's descriptor, driver and device part (virtio 1.2, 2.7 and 2.8.10.1).

    Raises RingError for a size that the layout does not allow.
    """

def inflight_bytes(layout: Literal["split", "packed"], size: int) -> int:
    """Bytes of one queue's part of the record of chains in flight (vhost-user, "Inflight I/O tracking")."""

@final
class Chain:
    """A buffer that the driver made available and a device has taken."""

    @property
    def id(self) -> int:
        """Split: index of its first descriptor; packed: buffer id."""
    @property
    def readable_len(self) -> int:
        """Bytes for the device to read."""
    @property
    def writable_len(self) -> int:
        """Bytes of room for the device to write."""
    @property
    def written(self) -> int:
        """Bytes written so far by `write`."""
    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """What the device may read from `offset` on, at most `size` bytes, copied. Another call may find other bytes:
        the driver can change them."""
    def discard(self) -> int:
        """Gives the memory of the room to write back to the system, whole pages only: it reads as zeroes until it is
        written again. Returns the bytes. Raises OSError where the memory's file does not allow it."""
    def write(self, data: bytes) -> None:
        """Writes behind what was written before. Raises ValueError if there is no room, or the chain was given back."""

@final
class DeviceQueue:
    """The device side of a virtqueue (virtio 1.2, 2.7 and 2.8): take chains, give them back, publish.

    Addresses are front-end-virtual, as in SET_VRING_ADDR; `base` is as in SET_VRING_BASE and by default that of a new
    ring. Raises RingError if size, alignment or place are not allowed.
    """

    def __new__(
        cls,
        memory: GuestMemory,
        *,
        layout: Literal["split", "packed"],
        size: int,
        descriptor_addr: int,
        driver_addr: int,
        device_addr: int,
        base: int | None = None,
        event_idx: bool = False,
        indirect: bool = False,
        in_order: bool = False,
    ) -> DeviceQueue: ...
    def set_memory(self, memory: GuestMemory) -> None:
        """Goes on with a new memory table. Raises RingError, and the queue is broken, if the ring is not in it."""
    def set_log_addr(self, addr: int | None) -> None:
        """Says where writes to the device part are logged while the memory has a log: as if the part began at this
        guest-physical address. None, as in the beginning: they are not (VHOST_VRING_F_LOG)."""
    def attach_inflight(self, fd: int, offset: int) -> int:
        """Records chains in flight in `inflight_bytes` bytes at `offset` of a file, all zero at first.

        Call it before the first `pop`. Where an earlier process left a record, it says where the queue goes on, and the
        chains in it are popped again first: returns how many. Raises ValueError if the file cannot be mapped, RingError
        if the record makes no sense.
        """
    def pop(self) -> Chain | None:
        """Takes the next chain. Raises RingError if it breaks the rules; the queue is broken for good then."""
    def push(self, chain: Chain, written: int | None = None) -> None:
        """Gives a chain back; `written` bytes (by default those that `Chain.write` wrote) are for the driver.

        The driver does not see it before `publish`. Raises ValueError for a chain of another queue, one that was given
        back before, or more bytes than it has room for.
        """
    def publish(self) -> bool:
        """Shows the driver all chains given back. Returns whether it wants to be notified."""
    def enable_notifications(self) -> bool:
        """Asks the driver for kicks. Returns whether chains are there already: then look again before sleeping."""
    def disable_notifications(self) -> None:
        """Asks the driver not to kick."""
    @property
    def base(self) -> int:
        """Where the queue stands, as in GET_VRING_BASE."""
    @property
    def error(self) -> str | None:
        """Why the queue is broken, if it is."""

@final
class DriverQueue:
    """The driver side of a virtqueue (virtio 1.2, 2.7 and 2.8): add buffers, kick, take them back.

    Making one initializes the ring. Ring addresses are front-end-virtual; buffers are guest-physical. `tables` is the
    guest address and length of an area for indirect tables: without one, buffers of several elements become chains.
    Raises RingError if size, alignment or place are not allowed.
    """

    def __new__(
        cls,
        memory: GuestMemory,
        *,
        layout: Literal["split", "packed"],
        size: int,
        descriptor_addr: int,
        driver_addr: int,
        device_addr: int,
        base: int | None = None,
        event_idx: bool = False,
        in_order: bool = False,
        tables: tuple[int, int] | None = None,
    ) -> DriverQueue: ...
    def add(self, out: Sequence[tuple[int, int]], input: Sequence[tuple[int, int]], token: int) -> bool:
        """Stages a buffer: (address, length) of the elements the device reads, then of those it writes.

        Returns whether there was room. Raises RingError for a buffer that could never be added.
        """
    def kick(self) -> bool:
        """Makes the staged buffers available. Returns whether the device wants to be notified."""
    def take(self) -> tuple[int, int] | None:
        """The next buffer that came back: its token and the bytes written into it.

        Raises RingError if the device breaks the rules; the queue is broken for good then.
        """
    def enable_notifications(self) -> bool:
        """Asks the device for calls. Returns whether buffers came back already: then look again before sleeping."""
    def disable_notifications(self) -> None:
        """Asks the device not to call."""
    @property
    def free(self) -> int:
        """Descriptors that the device does not hold."""
    @property
    def base(self) -> int:
        """Where the queue stands, as in SET_VRING_BASE: a device can be started from here."""

Queue = tuple[int, int, dict[str, int], int, int]
"""Frames, bytes, drops by reason, notifications sent, offloads completed."""

@final
class Switch:
    """The data path: ports by number, and poller threads that carry frames between them.

    Virtqueues of a port are numbered as in virtio 1.2, 5.1.2: the guest receives on even ones and transmits on odd
    ones. File descriptors are duplicated. Methods raise ValueError for what is wrong with their arguments (no such
    port, a ring outside the memory) and OSError for what the system refuses.
    """

    def __new__(cls, pollers: list[int | None], polling: str, event_fd: int) -> Switch:
        """Starts a poller for each entry, pinned to that CPU or free; `event_fd` is signalled when there are events."""
    def add_port(self, name: str, pairs: int, vlan: int | None, trunk: list[tuple[int, int]], max_frame: int) -> int:
        """Adds a port whose queues are down and returns its number. `max_frame` in bytes, 0: no limit."""
    def remove_port(self, port: int) -> None:
        """Stops the port's queues and forgets its stations."""
    def change_port(self, port: int, vlan: int | None, trunk: list[tuple[int, int]], max_frame: int) -> None:
        """Changes a port while frames flow."""
    def set_rules(
        self,
        port: int,
        *,
        macs: list[bytes],
        spoofcheck: bool,
        private: bool,
        learn_limit: int,
        rate: tuple[int, int, int],
        rate_out: tuple[int, int, int],
        storm: int,
        unknown: int,
    ) -> None:
        """Gives a port other rules while frames flow. Rates are bits a second, frames a second, burst in microseconds;
        `storm` and `unknown` frames a second; 0: no limit."""
    def rule_stats(self, port: int) -> tuple[int, int, int, int]:
        """Addresses learned now, frames whose source was not learned for the quota, addresses that came from other
        ports, and times that the port had to wait for its rate."""
    def take_flaps(self) -> list[tuple[str, int, int, int, int]]:
        """Takes the addresses that go back and forth: address, VLAN, port before, port now, and how often."""
    def set_accepted(self, port: int, accepts: list[str]) -> None:
        """Which offloads may be left to the port's receiver: csum, tso4, tso6, ecn, uso."""
    def start_queue(
        self,
        port: int,
        index: int,
        memory: GuestMemory,
        *,
        layout: str,
        size: int,
        descriptor_addr: int,
        driver_addr: int,
        device_addr: int,
        base: int,
        event_idx: bool,
        indirect: bool,
        in_order: bool,
        mergeable: bool,
        header_len: int,
        kick_fd: int | None,
        call_fd: int | None,
        log_addr: int | None,
        inflight: tuple[int, int] | None = None,
        certain: bool = False,
    ) -> None:
        """Starts a virtqueue, disabled. `inflight`: file and offset of its record of chains in flight, see
        `DeviceQueue.attach_inflight`. `log_addr` as in `set_log_addr`. `certain`: whoever served it until now has told
        the base, no front-end."""
    def stop_queue(self, port: int, index: int) -> int | None:
        """Stops a virtqueue and says where it stands; None if it was not running."""
    def enable_queue(self, port: int, index: int, enabled: bool) -> None:
        """A disabled queue delivers nothing, and what it transmits is discarded."""
    def set_call(self, port: int, index: int, fd: int | None) -> None:
        """Replaces the descriptor that notifies the driver."""
    def set_log_addr(self, port: int, index: int, addr: int | None) -> None:
        """Says where writes to a running queue's device part are logged while the memory has a log; None: nowhere."""
    def set_memory(self, port: int, memory: GuestMemory) -> None:
        """Gives the running queues of a port a new memory. When this returns the old one and its log are left alone."""
    def translations_changed(self, port: int) -> None:
        """Lets the queues of a port that waited for an answer of the IOMMU go on."""
    def translations_removed(self, port: int, first: int, last: int) -> None:
        """I/O virtual addresses of a port stand for something else now, or for nothing: when this returns, nobody uses
        what they stood for."""
    def attach_tap(self, port: int, pair: int, fd: int, accepts: list[str]) -> None:
        """Makes a queue of a tap interface (IFF_VNET_HDR, 12 bytes) a queue pair of the port."""
    def attach_replay(self, port: int, fd: int, skip: int = 0) -> None:
        """Sends the frames of a pcap or pcapng file into the switch, once, without the first `skip`."""
    def attach_record(self, port: int, fd: int, begun: bool = False) -> None:
        """Writes frames for the port to a pcap file; `begun`: it has its header already."""
    def attach_null(self, port: int) -> None:
        """Swallows frames for the port."""
    def add_capture(self, port: int, capture: Capture) -> None:
        """Copies what passes the port into `capture`, beside others."""
    def remove_capture(self, port: int, capture: Capture) -> None:
        """Ends that."""
    def announce(self, port: int, frame: bytes) -> None:
        """Forwards an Ethernet frame as if it had come from the port."""
    def hold(self) -> list[tuple[int, int, int]]:
        """Stops all pollers at a batch boundary; nothing touches a ring until `resume`. Every frame that was taken up
        is dealt with. Port, index and base of each running virtqueue."""
    def resume(self) -> None:
        """Lets the pollers go on."""
    def restore_counters(self, port: int, received: list[Queue], sent: list[Queue]) -> None:
        """Adds what an earlier process has counted, as `port_stats` shows it. Frames must not flow yet."""
    def restore_stations(self, stations: list[tuple[bytes, int, int, int]]) -> None:
        """Puts stations into the forwarding table: address, VLAN, port and age in epochs."""
    def skip_replay(self, port: int, frames: int) -> None:
        """Goes on with the port's capture file behind its first `frames` frames."""
    def replayed(self, port: int) -> int:
        """How many frames of its capture file a port has replayed."""
    def age(self) -> int:
        """Begins an ageing epoch: stations not heard for 14 of them are forgotten. Returns how many."""
    def forget_stations(self, port: int) -> None:
        """Forgets the stations behind a port."""
    def stations(self) -> list[tuple[str, int, int, int]]:
        """Address, VLAN, port and age in epochs of each known station."""
    def port_stats(self) -> list[tuple[int, bool, list[Queue], list[Queue]]]:
        """Number, whether it is up, and counters by queue pair: from the port, and to it."""
    def poller_stats(self) -> list[tuple[float, float, int, int, int, list[int], int, int, int, int]]:
        """Busy and idle seconds, busy ticks, rounds, frames, batches by size (1, 2-3, ... 64), sleeps, wake-ups by
        frames, polled queues, assigned queues."""
    def take_events(self) -> list[tuple[int, int, str]]:
        """Port, virtqueue and what went wrong there, since the last call."""

def queue_states(switch: Switch, port: int) -> list[tuple[int, bool, bool, bool, bool, int, int, bool, int]]:
    """The virtqueues of a port: index, started, enabled, broken, memory faulted, size, descriptors waiting, whether the
    driver can kick, kicks that woke us. Raises ValueError if there is no such port."""

def taken_address(switch: Switch, port: int) -> tuple[str, int, int] | None:
    """The last address that a port lost to another: address, VLAN, the other's number."""

@final
class Trace:
    """The next `count` packets of a port; the eventfd is written when some wait."""

    def __new__(cls, count: int, event_fd: int) -> Trace: ...
    def take(
        self,
    ) -> list[tuple[int, int, int, int, list[tuple[int, bool, int, int, int]], int, int, bytes, tuple[str, int, int]]]:
        """Time in nanoseconds since 1970, virtqueue, place in the ring, chain, descriptors (index, whether in an
        indirect table, address, length, flags), header length, length, first bytes, and what became of it: `written`,
        `forwarded` with port and queue, `flooded`, or why it was dropped."""

def trace_port(switch: Switch, port: int, trace: Trace) -> None:
    """Show the next packets of a port to `trace`. Raises ValueError if there is no such port."""

def untrace_port(switch: Switch, port: int, trace: Trace) -> None:
    """End what `trace_port` began. Raises ValueError if there is no such port."""

def drop_capabilities(keep: list[str]) -> list[str]:
    """Give up all capabilities of this thread but these (capabilities(7)), for good. Returns those that are left.

    Raises OSError if the kernel refuses, ValueError for an unknown name.
    """

def restrict_access(readable: list[str], executable: list[str], writable: list[str], listen: list[int]) -> str:
    """Leave this thread, and those it starts, only these paths and what is below, and these TCP ports to listen on
    (landlock(7)). Returns how much of that the kernel enforces: `fully`, `partly` or `not at all`.

    Raises OSError if the kernel refuses.
    """

def filter_system_calls(event_fd: int, inherited: bool) -> None:
    """Leave all threads only the system calls that a switch makes (seccomp(2)); others fail with ENOSYS, and the
    eventfd is written. `inherited`: the filter is there already, from the process that started this one.

    Raises OSError if the kernel refuses.
    """

def refused_system_calls() -> list[tuple[str, int]]:
    """System calls that were refused so far, and how often."""

def drop_reasons() -> list[str]:
    """Why frames are dropped: every reason that `Switch.port_stats` can name."""

@final
class Capture:
    """Copies of the frames that pass a port, up to 32 MB of them."""

    def __new__(cls, snap: int, event_fd: int) -> Capture:
        """Keeps `snap` bytes of each frame; `event_fd` is signalled when there are frames."""
    def take(self) -> list[tuple[int, bool, int, bytes]]:
        """Nanoseconds since 1970, whether the port sent it, its length, its bytes."""
    @property
    def missed(self) -> int:
        """Frames for which there was no room."""

def guest_memory_size(features: int, mtu: int, sizes: list[int]) -> int:
    """Bytes of memory that a guest's rings and buffers need, whatever subset of `features` is negotiated."""

@final
class Station:
    """A guest: a TCP/IP stack on a thread of its own, over queues that a front-end has set up.

    What takes time returns a ticket at once; its end is an event, which `event_fd` announces. Raises `ValueError` for
    what cannot work.
    """

    def __new__(cls, mac: bytes, addresses: list[tuple[str, int]], gateways: list[str], mtu: int, seed: int) -> Station:
        """`addresses` have their prefix lengths with them; `seed` makes sequence and port numbers."""
    def prepare(
        self,
        memory: GuestMemory,
        features: int,
        data_addr: int,
        data_end: int,
        queues: list[tuple[int, int, int, int, int, int, int]],
    ) -> None:
        """Initializes queues: size, descriptor, driver and device address, base, kick and call descriptor. Buffers lie
        from `data_addr` up to `data_end`. To be called before the device starts."""
    def attach(self) -> None:
        """Begins to use them."""
    def detach(self) -> None:
        """Lets go of the queues; they are no longer touched when this returns."""
    def ping(self, remote: str, count: int, interval: float, timeout: float, size: int) -> int:
        """Sends echo requests; 0 of them: until cancelled. Times in seconds."""
    def stream(
        self,
        remote: str,
        port: int,
        direction: str,
        bytes: int | None,
        seconds: float | None,
        patience: float,
        seed: int,
    ) -> int:
        """Carries content over TCP; `direction` is send, receive or echo; either `bytes` or `seconds`."""
    def datagrams(
        self,
        remote: str,
        port: int,
        size: int,
        rate: float | None,
        bytes: int | None,
        seconds: float | None,
        patience: float,
        seed: int,
    ) -> int:
        """Sends UDP datagrams, `rate` of them a second; either `bytes` of payload in all or `seconds`."""
    def serve(self, echo: int, sink: int, source: int) -> int:
        """Opens services on these ports, until cancelled."""
    def cancel(self, ticket: int) -> None:
        """Ends a task early: it reports what it has."""
    def announce(self) -> None:
        """Tells switches and neighbours where this guest is."""
    @property
    def link_up(self) -> bool:
        """Whether there are queues."""
    @property
    def event_fd(self) -> int:
        """Readable while there are events."""
    def take_events(self) -> list[tuple[int, str, dict[str, Any]]]:
        """Ticket, kind of outcome and its fields of each task that has ended."""
    def counters(self) -> dict[str, int]:
        """Counts of the link by name."""
    def services(self) -> dict[str, int]:
        """Counts of the services by name."""
    def close(self) -> None:
        """Stops the thread. May be called twice."""

@final
class TrafficSource:
    """Sends frames that can be judged, on a thread of its own. Raises `ValueError` for what cannot work."""

    def __new__(
        cls,
        source: bytes,
        destination: bytes,
        *,
        macs: int,
        flows: int,
        size: int,
        rate: float | None,
        burst: int,
        count: int | None,
        seconds: float | None,
        session: int,
        mtu: int,
    ) -> TrafficSource:
        """`source` and `destination` are the first of `macs` addresses each; `size` is in bytes with the Ethernet
        header; `rate` in frames a second."""
    def prepare(
        self,
        memory: GuestMemory,
        features: int,
        data_addr: int,
        data_end: int,
        queues: list[tuple[int, int, int, int, int, int, int]],
    ) -> None:
        """Initializes queues, as `Station.prepare`."""
    def attach(self) -> None:
        """Begins or goes on with them."""
    def detach(self) -> None:
        """Lets go of the queues; they are no longer touched when this returns."""
    def report(self) -> dict[str, Any]:
        """Counts by name, as of a moment ago; times in nanoseconds."""
    @property
    def event_fd(self) -> int:
        """Readable while there are events."""
    def take_events(self) -> list[tuple[str, str]]:
        """``done`` or ``link-broken``, and why, since the last call."""
    def counters(self) -> dict[str, int]:
        """Counts of the link by name."""
    def close(self) -> None:
        """Stops the thread. May be called twice."""

@final
class TrafficSink:
    """Receives and judges such frames, on a thread of its own."""

    def __new__(cls, mac: bytes, *, macs: int, verify: bool, count: int | None, mtu: int) -> TrafficSink:
        """Announces `macs` addresses from `mac` on; `verify` checks every byte; done after `count` frames."""
    def prepare(
        self,
        memory: GuestMemory,
        features: int,
        data_addr: int,
        data_end: int,
        queues: list[tuple[int, int, int, int, int, int, int]],
    ) -> None:
        """Initializes queues, as `Station.prepare`."""
    def attach(self) -> None:
        """Begins or goes on with them."""
    def detach(self) -> None:
        """Lets go of the queues; they are no longer touched when this returns."""
    def report(self) -> dict[str, Any]:
        """Counts by name, as of a moment ago; times in nanoseconds."""
    @property
    def event_fd(self) -> int:
        """Readable while there are events."""
    def take_events(self) -> list[tuple[str, str]]:
        """``done`` or ``link-broken``, and why, since the last call."""
    def counters(self) -> dict[str, int]:
        """Counts of the link by name."""
    def close(self) -> None:
        """Stops the thread. May be called twice."""
