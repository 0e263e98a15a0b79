"""The places in the first MiB of RAM that the loader uses, whatever the kernel is.

```
0x0_0500  GDT                              0x2_0000  command line, to 0x3_0000
0x0_6000  start info of PVH or multiboot   0x9_FC00  end of what the memory map calls usable
0x0_7000  zero page of Linux               0xE_0000  ACPI tables, to 0xF_0000; the RSDP first
0x0_8000  setup_data of Linux              0xF_0000  MP tables, to 0xF_FFF0; the floating pointer first
0x0_9000  page tables, 6 pages             0xF_FFF0  the reset vector
```

A kernel may use all of the usable part again as soon as it has read what it needs.
"""

from __future__ import annotations

GDT = 0x500
START_INFO = 0x6000
START_INFO_END = ZERO_PAGE = 0x7000
SETUP_DATA = 0x8000
PAGE_TABLES = 0x9000
COMMAND_LINE = 0x2_0000
COMMAND_LINE_AREA = 0x1_0000
ACPI_TABLES, ACPI_TABLES_END = 0xE_0000, 0xF_0000
MP_TABLES, MP_TABLES_END = 0xF_0000, 0xF_FFF0
RESET_VECTOR = 0xF_FFF0
