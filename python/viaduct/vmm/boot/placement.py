"""A guest's RAM while a kernel is being put into it: what is where, and that nothing lies upon something else."""

from __future__ import annotations

from typing import NamedTuple

from viaduct._core import GuestMemory
from viaduct.vmm.boot.errors import BootError
from viaduct.vmm.boot.image import PIECE, Image
from viaduct.vmm.memory_map import MIB, PAGE

ZEROES = bytes(PIECE)
OURS = "the loader"


class Claim(NamedTuple):
    """A range of addresses that something has been loaded to."""

    start: int
    end: int
    what: str
    subject: str
    """The file it comes from; `OURS` is what the loader itself puts there."""


class Placement:
    """The addresses of RAM, claimed before they are written. The RAM is new: zeroes."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.ranges: list[tuple[int, int]] = []
        """Start and end of each range of addresses without a gap, by address."""
        for start, size, _, _ in memory.regions:
            if self.ranges and self.ranges[-1][1] == start:
                start = self.ranges.pop()[0]
            self.ranges.append((start, start + size))
        self._claims: list[Claim] = []

    @property
    def size(self) -> int:
        """All of it, in bytes."""
        return sum(end - start for start, end in self.ranges)

    def claim(self, start: int, size: int, what: str, subject: str) -> None:
        """Take a range for `what`, a part of the file or option `subject`.

        Raises BootError where it is not RAM, or belongs to something else.
        """
        end = start + size
        if not any(low <= start and end <= high for low, high in self.ranges):
            raise BootError(
                subject,
                f"{what} belongs at {start:#x} to {end:#x}, but RAM is at {self}",
                "give the machine more memory (--memory), or take another file",
            )
        for other in self._claims:
            if start < other.end and other.start < end:
                raise BootError(
                    other.subject if subject == OURS else subject,
                    f"{what} belongs at {start:#x} to {end:#x}, but {other.start:#x} to {other.end:#x} "
                    f"belongs to {other.what}",
                    "the file is damaged, or was linked for another machine",
                )
        self._claims.append(Claim(start, end, what, subject))

    def highest(self, size: int, *, above: int, below: int) -> int | None:
        """The highest page where `size` bytes lie free between two addresses; None if there is no such place."""
        ends = {min(end, below) for _, end in self.ranges} | {claim.start for claim in self._claims}
        for end in sorted((end for end in ends if end <= below), reverse=True):
            start = (end - size) // PAGE * PAGE
            if start >= above and self._free(start, start + size):
                return start
        return None

    def lowest(self, size: int, *, above: int, alignment: int, below: int) -> int | None:
        """The lowest multiple of `alignment` where `size` bytes lie free between two addresses; None likewise."""
        starts = {max(start, above) for start, _ in self.ranges} | {claim.end for claim in self._claims}
        for start in sorted(-(-start // alignment) * alignment for start in starts if start >= above):
            if start + size <= below and self._free(start, start + size):
                return start
        return None

    def _free(self, start: int, end: int) -> bool:
        return any(low <= start and end <= high for low, high in self.ranges) and not any(
            start < claim.end and claim.start < end for claim in self._claims
        )

    def write(self, address: int, data: bytes) -> None:
        """Change bytes that were claimed."""
        self._memory.write(address, data)

    def place(self, address: int, data: bytes, what: str) -> None:
        """Claim a range for something of the loader's own, and write it. Raises BootError as `claim` does."""
        self.claim(address, len(data), what, OURS)
        self.write(address, data)

    def copy(self, image: Image, offset: int, size: int, address: int, what: str) -> None:
        """Copy a part of a file to a range that was claimed. Raises BootError where the file ends before.

        Zeroes are there already, and stay no memory of the host's: about half of an unpacked Linux is that.
        """
        for place, piece in image.pieces(offset, size, what):
            if piece != ZEROES[: len(piece)]:
                self.write(address + place, piece)

    def __str__(self) -> str:
        return " and ".join(f"{start:#x} to {end:#x} ({_mib(end - start)})" for start, end in self.ranges)


def _mib(size: int) -> str:
    return f"{size // MIB} MiB" if size % MIB == 0 else f"{size} bytes"
