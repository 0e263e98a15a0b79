"""Reserves hugepages for the peers and the generator (DPDK needs them; Viaduct does not), and gives them back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RESERVED = Path("/proc/sys/vm/nr_hugepages")
PAGE_MB = 2


class HugepageError(RuntimeError):
    """The kernel did not give as many hugepages as the benchmark needs."""


def _free() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return int(line.split()[1])
    return 0


@contextmanager
def reserved(megabytes: int) -> Iterator[None]:
    """At least `megabytes` of free 2 MB pages while the context lasts. Raises HugepageError."""
    wanted = -(-megabytes // PAGE_MB)
    missing = max(0, wanted - _free())
    try:
        if missing:
            _RESERVED.write_text(str(int(_RESERVED.read_text()) + missing))
        if _free() < wanted:
            raise HugepageError(f"{wanted} free hugepages of 2 MB are needed for DPDK, {_free()} could be had")
        yield
    except PermissionError:
        raise HugepageError(
            f"{missing} more hugepages are needed for DPDK and only root may reserve them: "
            f"echo {int(_RESERVED.read_text()) + missing} | sudo tee {_RESERVED}"
        ) from None
    finally:
        if missing:
            _RESERVED.write_text(str(max(0, int(_RESERVED.read_text()) - missing)))
