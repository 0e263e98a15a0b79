"""What pings and streams come to. Times are in seconds, durations of packets in microseconds."""

from __future__ import annotations

from typing import Any

import msgspec


class Latency(msgspec.Struct, frozen=True):
    """A distribution of durations, in microseconds; percentiles are exact to 1.6 %."""

    count: int
    min_us: float
    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float

    @classmethod
    def from_nanoseconds(cls, summary: dict[str, int] | None) -> Latency | None:
        """The summary that the Rust half gives; None if nothing was measured."""
        if summary is None:
            return None
        return cls(summary["count"], *(summary[name] / 1000 for name in _FIELDS))


_FIELDS = ("min", "mean", "p50", "p90", "p99", "p999", "max")


class Ping(msgspec.Struct, frozen=True):
    """Echo requests to one address and what came back."""

    remote: str
    size: int
    """Bytes behind the ICMP header."""
    sent: int
    received: int
    """Requests answered in time with the payload they carried."""
    duplicated: int
    corrupted: int
    """Replies with another payload."""
    round_trips: list[tuple[int, float]]
    """Sequence number and round-trip time in seconds, in the order of the replies."""
    rtt: Latency | None

    @property
    def lost(self) -> int:
        """Requests that were not answered in time."""
        return self.sent - self.received

    def __str__(self) -> str:
        text = f"{self.remote}: {self.received} of {self.sent} answered"
        return text if self.rtt is None else f"{text}, median {self.rtt.p50_us:.0f} us"


class Stream(msgspec.Struct, frozen=True):
    """One TCP connection that carried checkable content."""

    remote: str
    port: int
    direction: str
    """``send``, ``receive`` or ``echo``."""
    sent: int
    """Content bytes that the other side acknowledged."""
    received: int
    seconds: float
    """From the established connection to the last content byte."""
    verified: bool | None
    """Whether every byte arrived as it was sent; None if the other side, no `viaduct guest serve`, does not say."""
    first_mismatch: int | None
    """Offset of the first byte that was wrong."""
    peer: dict[str, Any] | None
    """What the sink said it got."""
    error: str | None
    """Why the stream ended before its time."""

    @property
    def bits_per_second(self) -> float:
        """Content carried over time; for an echo, one way."""
        moved = self.sent if self.direction == "send" else self.received
        return 8 * moved / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        verdict = {True: "verified", False: "CONTENT WRONG", None: "not verified"}[self.verified]
        moved = self.sent if self.direction == "send" else self.received
        text = f"{self.remote}: {self.direction} {moved} bytes in {self.seconds:.2f} s, "
        return f"{text}{self.bits_per_second / 1e9:.2f} Gbit/s, {verdict}"


class Datagrams(msgspec.Struct, frozen=True):
    """UDP datagrams to a sink."""

    remote: str
    port: int
    size: int
    """UDP payload bytes of each."""
    sent: int
    seconds: float
    received: int | None
    """What the sink counted, each once; None if it does not answer (it is no `viaduct guest serve`)."""
    duplicated: int | None
    reordered: int | None
    corrupted: int | None

    @property
    def lost(self) -> int | None:
        """Datagrams that did not arrive."""
        return None if self.received is None else self.sent - self.received

    @property
    def rate(self) -> float:
        """Datagrams a second."""
        return self.sent / self.seconds if self.seconds > 0 else 0.0
