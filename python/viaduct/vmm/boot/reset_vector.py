"""What is at the reset vector, F000:FFF0 in real mode, where a PC's BIOS begins and starts the machine anew.

Kernels jump there to restart a machine by its BIOS (Linux: `reboot=b`). Linux does so of its own accord where ACPI is
hardware-reduced: it takes it that such a machine has EFI, and passes over the reset register (`efi_reboot_required`).
There is no BIOS behind our vector, but the way to the reset control.
"""

from __future__ import annotations

from viaduct.vmm.memory_map import RESET_PORT, RESET_VALUE

RESET_CODE = bytes(
    (
        *(0xBA, *RESET_PORT.to_bytes(2, "little")),  # mov dx, RESET_PORT
        *(0xB0, RESET_VALUE),  # mov al, RESET_VALUE
        0xEE,  # out dx, al
        0xF4,  # hlt: the machine is reset while the processor waits
        *(0xEB, 0xFD),  # jmp to the hlt
    )
)
