"""From files on disk to the first instruction of a vCPU."""

from viaduct.vmm.boot.cpu_state import CpuState, Segment, Table
from viaduct.vmm.boot.errors import BootError

__all__ = ["BootError", "CpuState", "Segment", "Table"]
