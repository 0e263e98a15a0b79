"""A moment as people say it: so long ago, or a date and time."""

from __future__ import annotations

import re
import time
from datetime import datetime

from .failure import USAGE, Failure

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def moment(text: str) -> float:
    """Seconds since 1970 of `90s`, `10m`, `2h` or `1d` ago, or of a local date and time (ISO 8601).

    Raises:
        Failure: it is neither.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return time.time() - float(match[1]) * _SECONDS[match[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise Failure(
            f"--since {text}: neither a time ago (90s, 10m, 2h, 1d) nor a moment such as 2026-01-31T23:59", USAGE
        ) from None
