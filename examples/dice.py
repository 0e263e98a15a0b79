"""A device of registers: a guest that reads its port throws a die.

    viaduct run --kernel kernel.bin --device examples/dice.py:Dice,pio=0x700+4

Register 0 is the die; register 1 how many faces it has, and the guest may write it. `faces=20` behind `pio=...` is
where it begins. docs/devices.md says what else such a class may have.
"""

from __future__ import annotations

import random
from typing import Any


class Dice:
    """Two registers of one byte."""

    def __init__(self, faces: str = "6") -> None:
        self.faces = int(faces)

    def read(self, offset: int, size: int) -> int:
        """The guest reads `size` bytes."""
        if offset == 0:
            return random.randint(1, self.faces)
        return self.faces if offset == 1 else 0

    def write(self, offset: int, data: bytes) -> None:
        """The guest writes. Whatever it says has to make sense afterwards."""
        if offset == 1:
            self.faces = max(1, data[0])

    def save(self) -> dict[str, Any]:
        """For a snapshot."""
        return {"faces": self.faces}

    def restore(self, data: dict[str, Any]) -> None:
        """The machine goes on from one."""
        self.faces = data["faces"]
