"""The devices of a machine that no bus tells a kernel about, in ACPI machine language (ACPI 6.5, 5.2.11.1)."""

from __future__ import annotations

from viaduct.vmm.boot.aml import (
    ZERO,
    Term,
    and_,
    arg,
    bus_window,
    device,
    dword_field,
    edge_interrupt,
    eisa_id,
    else_,
    equal,
    if_,
    integer,
    local,
    memory,
    memory_window,
    memory_window_64,
    method,
    name,
    not_,
    notify,
    or_,
    package,
    path,
    port_window,
    ports,
    resources,
    return_,
    scope,
    store,
    string,
    to_uuid,
)
from viaduct.vmm.boot.platform import Platform
from viaduct.vmm.memory_map import (
    I8042_COMMAND,
    I8042_DATA,
    I8042_GSI,
    PCI_BUSES,
    PCI_CONFIG_PORT,
    PCI_ECAM,
    PCI_ECAM_SIZE,
    PCI_PORTS,
    PCI_PORTS_SIZE,
    PCI_WINDOW_32,
    PCI_WINDOW_32_SIZE,
    PCI_WINDOW_64_SIZE,
    POWER_BUTTON_GSI,
    PVPANIC_PORT,
    RTC_PORT,
    SERIAL_GSI,
    SERIAL_PORT,
    VIRTIO_MMIO_SIZE,
    pci_intx_gsi,
    pci_window_64,
    virtio_mmio_slot,
)

SLEEP_TYPE_OFF = 5
"""SLP_TYP for soft off: what \\_S5 says is what the guest writes to the sleep control register (ACPI 6.5, 7.4.2.6)."""
PCI_OSC = "33db4d5b-1ff7-401c-9657-7441c03dd766"
"""PCI Firmware Specification 3.3, 4.5.1: the platform's _OSC interface for host bridges."""
OSC_EXPRESS_CAPABILITY = 1 << 4
OSC_UNKNOWN_UUID, OSC_UNKNOWN_REVISION, OSC_MASKED = 1 << 2, 1 << 3, 1 << 4
POWER_BUTTON_PRESSED = 0x80
"""What a power button notifies of (5.6.6)."""
PRESENT = 0xF
"""_STA: present, enabled, shown and working (6.3.7)."""


def dsdt(platform: Platform, ram_size: int) -> bytes:
    """The definition block of the DSDT: all devices of `platform` in a machine with `ram_size` bytes of RAM."""
    devices: list[Term] = []
    if platform.pci:
        devices += [_host_bridge(ram_size), _reserved()]
    devices += [_virtio_mmio(slot) for slot in platform.virtio_mmio]
    if platform.serial:
        resource = resources(ports(SERIAL_PORT, 8), edge_interrupt(SERIAL_GSI))
        devices.append(_device("COM1", eisa_id("PNP0501"), 1, name("_CRS", resource)))
    if platform.rtc:
        # No interrupt: the clock has no alarms, and Linux does not promise any then.
        resource = resources(ports(RTC_PORT, 2))
        devices.append(_device("RTC", eisa_id("PNP0B00"), 0, name("_CRS", resource)))
    if platform.i8042:
        resource = resources(ports(I8042_DATA, 1), ports(I8042_COMMAND, 1), edge_interrupt(I8042_GSI))
        devices.append(_device("KBD", eisa_id("PNP0303"), 0, name("_CRS", resource)))
    if platform.pvpanic:
        devices.append(_device("PEVT", string("QEMU0001"), 0, name("_CRS", resources(ports(PVPANIC_PORT, 1)))))
    devices += _power_button()
    off = name("_S5", package(integer(SLEEP_TYPE_OFF), ZERO, ZERO, ZERO))
    return scope("\\_SB", *devices) + off


def _device(what: str, identifier: Term, number: int, *terms: Term) -> Term:
    head = (name("_HID", identifier), name("_UID", integer(number)), name("_STA", integer(PRESENT)))
    return device(what, *head, *terms)


def _power_button() -> tuple[Term, Term]:
    """A button that is only there to be notified about (4.8.2.2.1.2), and what turns an interrupt into that: the
    generic event device (5.6.9), as there is no fixed hardware."""
    pressed = method("_EVT", 1, notify(path("\\_SB.PWRB"), POWER_BUTTON_PRESSED))
    button = _device("PWRB", eisa_id("PNP0C0C"), 0)
    events = _device("GED", string("ACPI0013"), 0, name("_CRS", resources(edge_interrupt(POWER_BUTTON_GSI))), pressed)
    return button, events


def _virtio_mmio(slot: int) -> Term:
    address, gsi = virtio_mmio_slot(slot)
    resource = resources(memory(address, VIRTIO_MMIO_SIZE), edge_interrupt(gsi))
    return _device(f"VIO{slot}", string("LNRO0005"), slot, name("_CCA", integer(1)), name("_CRS", resource))


def _reserved() -> Term:
    """The configuration space of PCI as a resource of the board (PCI Firmware Specification 3.3, 4.1.2)."""
    return _device("MRES", eisa_id("PNP0C02"), 0, name("_CRS", resources(memory(PCI_ECAM, PCI_ECAM_SIZE))))


def _host_bridge(ram_size: int) -> Term:
    windows = resources(
        bus_window(0, PCI_BUSES),
        ports(PCI_CONFIG_PORT, 8),
        port_window(PCI_PORTS, PCI_PORTS_SIZE),
        memory_window(PCI_WINDOW_32, PCI_WINDOW_32_SIZE),
        memory_window_64(pci_window_64(ram_size), PCI_WINDOW_64_SIZE),
    )
    return _device(
        "PCI0",
        eisa_id("PNP0A08"),
        0,
        name("_CID", eisa_id("PNP0A03")),
        name("_SEG", ZERO),
        name("_BBN", ZERO),
        name("_CRS", windows),
        name("_PRT", _interrupts()),
        _osc(),
    )


def _interrupts() -> Term:
    """Which GSI each pin of each device is wired to (ACPI 6.5, 6.2.13): level-triggered, active low."""
    any_function = 0xFFFF
    return package(
        *(
            package(integer(number << 16 | any_function), integer(pin), ZERO, integer(pci_intx_gsi(number, pin)))
            for number in range(32)
            for pin in range(4)
        )
    )


def _osc() -> Term:
    """What the kernel may control itself (ACPI 6.5, 6.2.11.3): the capability structure of PCI Express, that is all."""
    status, control = path("CDW1"), path("CDW3")
    granted = local(0)
    return method(
        "_OSC",
        4,
        dword_field(arg(3), 0, "CDW1"),
        if_(
            equal(arg(0), to_uuid(PCI_OSC)),
            dword_field(arg(3), 8, "CDW3"),
            and_(control, integer(OSC_EXPRESS_CAPABILITY), granted),
            if_(not_(equal(arg(1), integer(1))), or_(status, integer(OSC_UNKNOWN_REVISION), status)),
            if_(not_(equal(control, granted)), or_(status, integer(OSC_MASKED), status)),
            store(granted, control),
        ),
        else_(or_(status, integer(OSC_UNKNOWN_UUID), status)),
        return_(arg(3)),
    )
