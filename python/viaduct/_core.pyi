"""The Rust half of Viaduct: packets, rings and guest memory. Decisions are made in Python."""

from typing import final

VERSION: str

@final
class GuestMemory:
    """An immutable table of memory regions that another process shares with us."""

    def __new__(cls) -> GuestMemory: ...
    def with_region(self, guest_addr: int, size: int, user_addr: int, mmap_offset: int, fd: int) -> GuestMemory:
        """This memory and a region mapped from `fd`, which stays the caller's.

        Raises ValueError where the region is empty, overlaps another, overflows or exceeds its file.
        """
    def without_region(self, guest_addr: int, size: int, user_addr: int) -> GuestMemory:
        """This memory without the region of exactly these values. Raises ValueError if there is none."""
    def read(self, addr: int, len: int) -> bytes:
        """The bytes at a guest-physical address. Raises ValueError where they are not all in regions."""
    def write(self, addr: int, data: bytes) -> None:
        """Changes the bytes at a guest-physical address. Raises ValueError where they are not all in regions."""
    @property
    def regions(self) -> list[tuple[int, int, int, int]]:
        """Guest address, size, user address and file offset of each region, by guest address."""
    @property
    def faulted(self) -> bool:
        """Whether the file behind a region became shorter under us: it reads as zeroes there."""

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
    def add_port(
        self, name: str, pairs: int, vlan: int | None, trunk: list[tuple[int, int]], max_frame: int
    ) -> int:
        """Adds a port whose queues are down and returns its number. `max_frame` in bytes, 0: no limit."""
    def remove_port(self, port: int) -> None:
        """Stops the port's queues and forgets its stations."""
    def change_port(self, port: int, vlan: int | None, trunk: list[tuple[int, int]], max_frame: int) -> None:
        """Changes a port while frames flow."""
    def set_accepted(self, port: int, accepts: list[str]) -> None:
        """Which offloads may be left to the port's receiver: csum, tso4, tso6, ecn, ufo, uso."""
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
    ) -> None:
        """Starts a virtqueue, disabled."""
    def stop_queue(self, port: int, index: int) -> int | None:
        """Stops a virtqueue and says where it stands; None if it was not running."""
    def enable_queue(self, port: int, index: int, enabled: bool) -> None:
        """A disabled queue delivers nothing, and what it transmits is discarded."""
    def set_call(self, port: int, index: int, fd: int | None) -> None:
        """Replaces the descriptor that notifies the driver."""
    def set_memory(self, port: int, memory: GuestMemory) -> None:
        """Gives the running queues of a port a new memory."""
    def attach_tap(self, port: int, pair: int, fd: int, accepts: list[str]) -> None:
        """Makes a queue of a tap interface (IFF_VNET_HDR, 12 bytes) a queue pair of the port."""
    def attach_replay(self, port: int, fd: int) -> None:
        """Sends the frames of a pcap or pcapng file into the switch, once."""
    def attach_record(self, port: int, fd: int) -> None:
        """Writes frames for the port to a pcap file."""
    def attach_null(self, port: int) -> None:
        """Swallows frames for the port."""
    def set_capture(self, port: int, capture: Capture | None) -> None:
        """Copies what passes the port, or stops that."""
    def announce(self, port: int, frame: bytes) -> None:
        """Forwards an Ethernet frame as if it had come from the port."""
    def age(self) -> int:
        """Begins an ageing epoch: stations not heard for 14 of them are forgotten. Returns how many."""
    def forget_stations(self, port: int) -> None:
        """Forgets the stations behind a port."""
    def stations(self) -> list[tuple[str, int, int, int]]:
        """Address, VLAN, port and age in epochs of each known station."""
    def port_stats(self) -> list[tuple[int, bool, list[Queue], list[Queue]]]:
        """Number, whether it is up, and counters by queue pair: from the port, and to it."""
    def poller_stats(self) -> list[tuple[float, float, int, int, int, list[int], int, int, int]]:
        """Busy and idle seconds, busy ticks, rounds, frames, batches by size (1, 2-3, ... 64), sleeps, polled queues,
        assigned queues."""
    def take_events(self) -> list[tuple[int, int, str]]:
        """Port, virtqueue and what went wrong there, since the last call."""

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
