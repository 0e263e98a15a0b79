"""The part of `viaduct._core` that is an emulated network card. It is no module of its own: import from
`viaduct._core`."""

from typing import final

from viaduct._core import GuestMemory
from viaduct._core_vmm import PciFunction

@final
class E1000(PciFunction):
    """Intel's 82540EM, for a slot of a `PciRoot`: registers, and a thread that moves frames.

    Its cable ends in a tap interface, or in a vhost-user back-end by `prepare`, `attach` and `detach`, which are those
    of a `viaduct.guest.link.QueueUser`, for a link without checksum and segmentation offloads and with the same `mtu`.
    Raises ValueError for an address that is none, and OSError without threads or descriptors.
    """

    def __new__(cls, name: str, mac: bytes, memory: GuestMemory, *, mtu: int = 1500) -> E1000: ...
    def attach_tap(self, fd: int) -> None:
        """Plugs the cable into a tap interface (IFF_TAP, IFF_NO_PI, without IFF_VNET_HDR); `fd` stays the caller's."""
    def prepare(
        self,
        memory: GuestMemory,
        features: int,
        data_addr: int,
        data_end: int,
        queues: list[tuple[int, int, int, int, int, int, int]],
    ) -> None:
        """Takes the queues of a virtio-net device. Raises ValueError for what cannot be driven."""
    def attach(self) -> None:
        """Plugs the cable into the device that was prepared."""
    def detach(self) -> None:
        """Pulls the cable out; the other end has been let go when this returns."""
    def set_memory(self, memory: GuestMemory) -> None:
        """From now on this is the guest's memory."""
    def take_complaint(self) -> str | None:
        """What went wrong since this was last called: something that no driver does, or how the other end was lost.

        Told at most 16 times in a card's life.
        """
    @property
    def complaint_fd(self) -> int:
        """An eventfd that is readable while there is a complaint; the card's."""
    def counters(self) -> dict[str, int]:
        """What the virtio-net driver has counted, by name; zeroes for a tap interface."""
    def pause(self) -> None:
        """Stops moving frames: guest memory is not touched any more."""
    def resume(self) -> None:
        """Moves frames again."""
    def save(self) -> bytes:
        """The state of the card, which is paused, for `restore`."""
    def restore(self, state: bytes) -> None:
        """Goes on from a saved state; the card is in its slot and paused. Raises ValueError for one that cannot be."""
