"""Where everything is: the addresses that a machine's guest sees.

Nothing else decides an address; the Rust devices get theirs as arguments. Guest-physical memory:

| from | to | what |
|---|---|---|
| 0x0000_0000 | 0x0009_FC00 | RAM; the first 256 KiB hold what the loader leaves, see `viaduct.vmm.boot` |
| 0x0009_FC00 | 0x0010_0000 | RAM that the memory map calls reserved: the loader's tables, where a BIOS has them |
| 0x0010_0000 | 0xC000_0000 | RAM, as much of it as there is |
| 0xC000_0000 | 0xE000_0000 | PCI: memory BARs of 32 bits |
| 0xE000_0000 | 0xF000_0000 | PCI: configuration space (ECAM), buses 0 to 255 |
| 0xFEB0_0000 | 0xFEB0_8000 | virtio-mmio: 8 slots, 4 KiB apart |
| 0xFEC0_0000 | 0xFEC0_1000 | IOAPIC |
| 0xFEE0_0000 | 0xFEF0_0000 | local APIC; messages of MSI |
| 0xFFFB_C000 | 0xFFFB_D000 | KVM's identity page table (needed by some processors of Intel) |
| 0xFFFB_D000 | 0xFFFC_0000 | KVM's task state segment (the same) |
| 0x1_0000_0000 | ... | the RAM that finds no place below 3 GiB |
| `pci_window_64` | + 64 GiB | PCI: memory BARs of 64 bits |

Ports:

| port | what |
|---|---|
| 0x0060, 0x0064 | i8042, IRQ 1 |
| 0x0070, 0x0071 | real-time clock, IRQ 8 |
| 0x00F4 | debug-exit |
| 0x03F8 - 0x03FF | serial port 16550, IRQ 4 |
| 0x0505 | pvpanic |
| 0x0600, 0x0601 | ACPI sleep control and status |
| 0x0CF8 - 0x0CFF | PCI configuration address and data |
| 0x0CF9 | reset control: the byte inside the address register that PC chipsets have there |
| 0xC000 - 0xFFFF | PCI: port BARs |

Interrupt numbers are GSIs: 0 to 15 are the ISA interrupts of the same number, 16 to 23 belong to virtio-mmio. 6 is the
power button's. At the IOAPIC each is the pin of the same number, except for the interval timer's interrupt 0: that is
pin 2.
"""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4 * KIB

RAM_LOW_END = 0xC000_0000
RAM_HIGH_START = 4 * GIB

CONVENTIONAL_END = 0x0009_FC00
"""The end of the RAM that kernels may use below 1 MiB; a PC has the extended BIOS data area from here."""
EXTENDED_START = 1 * MIB

PCI_WINDOW_32 = 0xC000_0000
PCI_WINDOW_32_SIZE = 0x2000_0000
PCI_ECAM = 0xE000_0000
PCI_BUSES = 256
PCI_ECAM_SIZE = PCI_BUSES * MIB
PCI_WINDOW_64_MIN = 16 * GIB
PCI_WINDOW_64_SIZE = 64 * GIB
PCI_PORTS = 0xC000
PCI_PORTS_SIZE = 0x4000
PCI_CONFIG_PORT = 0xCF8
PCI_INTX_GSIS = (5, 9, 10, 11)

VIRTIO_MMIO = 0xFEB0_0000
VIRTIO_MMIO_STRIDE = 0x1000
VIRTIO_MMIO_SIZE = 0x200
VIRTIO_MMIO_GSI = 16
VIRTIO_MMIO_SLOTS = 8

IOAPIC = 0xFEC0_0000
IOAPIC_PINS = 24
TIMER_IRQ, TIMER_PIN = 0, 2
"""Where a PC has its interval timer: interrupt 2, the second PIC's way to the first, needs no pin of the IOAPIC."""
LOCAL_APIC = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFFFB_C000
KVM_TSS = 0xFFFB_D000

POWER_BUTTON_GSI = 6
"""A PC's diskette drive has this one; ours has none."""
I8042_DATA, I8042_COMMAND, I8042_GSI = 0x60, 0x64, 1
RTC_PORT, RTC_GSI = 0x70, 8
DEBUG_EXIT_PORT = 0xF4
SERIAL_PORT, SERIAL_GSI = 0x3F8, 4
PVPANIC_PORT = 0x505
SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT = 0x600, 0x601
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
"""What is written to the reset port: a full reset, now."""


def ram_regions(size: int) -> list[tuple[int, int]]:
    """Guest address and size of each piece that `size` bytes of RAM are laid out in, by address.

    Raises ValueError where the size is not a positive number of pages.
    """
    if size <= 0 or size % PAGE:
        raise ValueError(f"{size} bytes of guest memory: allowed is a multiple of {PAGE} above 0")
    low = min(size, RAM_LOW_END)
    return [(0, low), (RAM_HIGH_START, size - low)] if size > low else [(0, low)]


def pci_window_64(ram_size: int) -> int:
    """Where the window for 64-bit BARs begins in a machine of `ram_size` bytes: above all RAM, at a whole GiB."""
    start, size = ram_regions(ram_size)[-1]
    return max(-(-(start + size) // GIB) * GIB, PCI_WINDOW_64_MIN)


def virtio_mmio_slot(slot: int) -> tuple[int, int]:
    """Guest address and GSI of a virtio-mmio slot. Raises ValueError for a slot that does not exist."""
    if not 0 <= slot < VIRTIO_MMIO_SLOTS:
        raise ValueError(f"virtio-mmio slot {slot}: there are 0 to {VIRTIO_MMIO_SLOTS - 1}")
    return VIRTIO_MMIO + slot * VIRTIO_MMIO_STRIDE, VIRTIO_MMIO_GSI + slot


def pci_intx_gsi(device: int, pin: int = 0) -> int:
    """The GSI of a PCI device's INTx pin (0 is INTA): by its device number, rotated as bridges do (PCI 3.0, 2.2.6)."""
    return PCI_INTX_GSIS[(device + pin) % len(PCI_INTX_GSIS)]
