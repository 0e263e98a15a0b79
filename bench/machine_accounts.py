"""What the host's kernel says of a process that runs a virtual machine: its memory and its guest's exits.

Nothing here knows whose process it is: Viaduct's and QEMU's are asked the same.
"""

import re
from pathlib import Path

import msgspec

KVM = Path("/sys/kernel/debug/kvm")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


class Memory(msgspec.Struct, frozen=True):
    """Bytes of a process that are in memory, those of its guest's memory left out. `proportional`: a page that n
    processes have in common counts for one nth."""

    resident: int
    proportional: int
    guest: int
    """Bytes of the guest's memory that are there, which the others leave out."""


def own_memory(smaps: str, guest_size: int) -> Memory:
    """From the text of /proc/PID/smaps (proc(5)).

    The guest's memory is the one mapping of exactly `guest_size` bytes, which therefore should be no size that anything
    else has. Raises ValueError if there is none, or more than one.
    """
    resident = proportional = guest = found = 0
    of_guest = False
    for line in smaps.splitlines():
        if mapping := _MAPPING.match(line):
            of_guest = int(mapping[2], 16) - int(mapping[1], 16) == guest_size
            found += of_guest
            continue
        field, _, rest = line.partition(":")
        if field not in ("Rss", "Pss"):
            continue
        size = int(rest.split()[0]) << 10
        if of_guest:
            guest += size if field == "Rss" else 0
        elif field == "Rss":
            resident += size
        else:
            proportional += size
    if found != 1:
        raise ValueError(f"{found} mappings have {guest_size} bytes; the guest's memory is expected, and nothing else")
    return Memory(resident, proportional, guest)


def exits(pid: int, directory: Path = KVM) -> dict[str, int]:
    """KVM's own counters of the machine that process `pid` runs, over all its vCPUs, those above zero.

    KVM makes a directory PID-FD for each machine (Linux, virt/kvm/kvm_main.c). Raises ValueError if the process has
    none, or several.
    """
    machines = list(directory.glob(f"{pid}-*"))
    if len(machines) != 1:
        raise ValueError(f"process {pid} has {len(machines)} machines in {directory}; one is expected")
    counts = {file.name: _number(file) for file in sorted(machines[0].iterdir()) if file.is_file()}
    return {name: count for name, count in counts.items() if count > 0}


def _number(file: Path) -> int:
    """A counter; 0 for a histogram."""
    words = file.read_text().split()
    return int(words[0]) if len(words) == 1 else 0
