"""From files on disk to the first instruction of a vCPU.

`load` recognises a kernel, puts it and all it needs into guest memory, and returns the state of the first vCPU; the
other vCPUs wait for the kernel to start them. Needs memory, no engine. The modules, in the order they are used:

- `loader` opens the files (`image`), finds out what the kernel is and which protocol starts it;
- `acpi` (with `dsdt` in `aml`) and `mp_tables` describe the machine (`platform`), `reset_vector` restarts it;
- `bzimage`, `linux_elf`, `pvh`, `multiboot` and `flat` are the protocols, `elf`, `payload`, `zero_page` and `e820`
  their parts;
- `placement` knows what is where, `low_memory` where the loader puts its own;
- `entry_modes` makes the `cpu_state`.
"""

from viaduct.vmm.boot.cpu_state import CpuState, Segment, Table
from viaduct.vmm.boot.errors import BootError
from viaduct.vmm.boot.loader import PROTOCOLS, load
from viaduct.vmm.boot.platform import Platform

__all__ = ["PROTOCOLS", "BootError", "CpuState", "Platform", "Segment", "Table", "load"]
