"""What a guest may cause as often as it likes is said less and less often: the first time, the second, the fourth, the
eighth, and with how often it was."""

from __future__ import annotations


class Seldom:
    """Counts events of a few kinds."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def text(self, kind: str, text: str) -> str | None:
        """The text if it is time to say it again, with the number behind it from the second time on. `kind` is none of
        the guest's choosing."""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count & (count - 1):
            return None
        return text if count == 1 else f"{text} ({count} times by now)"
