"""Where the counters are served to Prometheus: `127.0.0.1:9100`, `[::1]:9100`, `unix:/run/viaduct/metrics.sock`.

They say who talks how much with whom, so an address that others can reach must be meant: `public:0.0.0.0:9100`.
"""

from __future__ import annotations

import ipaddress
import os

import msgspec

from .config import ConfigError

FORMS = "127.0.0.1:9100, [::1]:9100 or unix:/run/viaduct/metrics.sock"


class MetricsAddress(msgspec.Struct, frozen=True):
    """Either `path`, a UNIX socket, or `host` (an IP address) and `port`."""

    path: str | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/metrics"


def parse_metrics_address(text: str) -> MetricsAddress:
    """Read an address as `--metrics` has it.

    Raises:
        ConfigError: it is of no such form, or others than this host could reach it and `public:` does not stand there.
    """
    kind, _, rest = text.partition(":")
    if kind == "unix":
        if not rest:
            raise _wrong(text, "the path is missing")
        return MetricsAddress(path=os.path.abspath(os.path.expanduser(rest)))
    public = kind == "public"
    host, colon, number = (rest if public else text).rpartition(":")
    if not colon or not number.isdecimal() or not 0 < int(number) <= 65535:
        raise _wrong(text, f"{number!r} is no port from 1 to 65535")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise _wrong(text, f"{host!r} is no IP address") from None
    if not address.is_loopback and not public:
        raise _wrong(
            text,
            f"{host} can be reached from other hosts, and whoever reaches it sees who talks how much; "
            f"if that is meant, write public:{text}",
        )
    return MetricsAddress(host=str(address), port=int(number))


def _wrong(text: str, problem: str) -> ConfigError:
    return ConfigError(f"{problem} (allowed: {FORMS})", source=f"--metrics {text}")
