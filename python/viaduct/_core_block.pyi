"""The part of `viaduct._core` that serves disks; `viaduct._core` exports it."""

from os import PathLike
from typing import Literal, final

from viaduct._core import GuestMemory

class ImageError(Exception):
    """A disk image that cannot be used; the text names the image, what was found and what to do."""

@final
class BlockDevice:
    """A disk and the threads that serve it, one for each queue (virtio 1.2, 5.2).

    Methods that wait let go of the interpreter. Descriptors are duplicated; the caller keeps his.
    """

    def __new__(
        cls,
        path: str | PathLike[str],
        event_fd: int,
        *,
        format: str | None = None,
        read_only: bool = False,
        serial: bytes = b"",
        io_uring: bool = True,
    ) -> BlockDevice:
        """Opens and locks the image at `path`. `format` is ``"raw"``, ``"qcow2"`` or None: then it is raw, unless the
        name ends in ".qcow2". `event_fd`: an eventfd that is signalled when there are events. `serial`: up to 20 bytes.
        `io_uring`: use it where it is to be had; else threads do its work.

        Raises `ImageError`, ValueError, OSError."""

    @property
    def size(self) -> int:
        """Bytes of the disk, a multiple of 512."""

    @property
    def format(self) -> str:
        """``"raw"`` or ``"qcow2"``."""

    def set_features(self, features: int) -> None:
        """The features in force."""

    def set_write_back(self, write_back: bool) -> None:
        """The configuration's `writeback` (virtio 1.2, 5.2.5.2). Becoming false makes durable what was written before;
        OSError if that fails."""

    def start_queue(
        self,
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
        kick_fd: int | None,
        call_fd: int | None,
        log_addr: int | None,
        inflight: tuple[int, int] | None = None,
    ) -> None:
        """Begins to serve a queue, disabled; `inflight`: file and offset of its record of requests in flight. Raises
        ValueError, OSError."""

    def enable_queue(self, index: int, enabled: bool) -> None:
        """Lets a queue's requests be taken, or not; disabled, those in flight have ended when this returns. ValueError
        if it is not started."""

    def set_call(self, index: int, fd: int | None) -> None:
        """Replaces what notifies the driver. ValueError if the queue is not started."""

    def set_log_addr(self, index: int, addr: int | None) -> None:
        """Where writes to the device part are logged while the memory has a log. ValueError if the queue is not
        started."""

    def set_memory(self, memory: GuestMemory) -> None:
        """Puts all started queues into a new memory; when this returns nothing uses the old one. ValueError if a ring
        does not lie there."""

    def drain_queue(self, index: int) -> None:
        """Has a queue take no more requests; the event "drained" tells when those in flight have ended. ValueError if
        it is not started."""

    def stop_queue(self, index: int) -> int:
        """Stops a queue, after what is in flight, and returns where it stands, as in `Vring.base`. ValueError if it is
        not started."""

    def take_events(self) -> list[tuple[Literal["disk", "request", "drained", "ring", "memory"], int, str, int]]:
        """What has happened since the last call: kind, queue, message, and how many others were left out before it."""

    def stats(self) -> dict[str, int]:
        """What was done so far: reads, bytes_read, writes, bytes_written, flushes, discards, failed, refused."""
