"""A port that swallows every frame."""

from __future__ import annotations

from .port import Port


class Null(Port):
    """Swallows what is sent to it and sends nothing."""

    async def _start(self) -> None:
        self.data_path.attach_null(self.number)
