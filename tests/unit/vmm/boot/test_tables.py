"""ACPI and MP tables, read back by the structures of their specifications; tests/interop has iasl look at them."""

from __future__ import annotations

import struct

import pytest

from viaduct.vmm import memory_map
from viaduct.vmm.boot import Platform, aml
from viaduct.vmm.boot.acpi import acpi_tables
from viaduct.vmm.boot.mp_tables import mp_tables
from viaduct.vmm.memory_map import GIB, MIB

BASE = 0xE_0000


def table_at(data: bytes, address: int) -> bytes:
    start = address - BASE
    (length,) = struct.unpack_from("<I", data, start + 4)
    table = data[start : start + length]
    assert sum(table) & 0xFF == 0, f"checksum of {table[:4]!r}"
    return table


def tables(platform: Platform, ram_size: int = GIB) -> dict[bytes, bytes]:
    data = acpi_tables(platform, BASE, ram_size)
    assert data[:8] == b"RSD PTR "
    assert data[15] == 2
    assert sum(data[:20]) & 0xFF == 0
    assert sum(data[:36]) & 0xFF == 0
    xsdt = table_at(data, struct.unpack_from("<Q", data, 24)[0])
    found = {xsdt[:4]: xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        assert address % 16 == 0
        found[data[address - BASE : address - BASE + 4]] = table_at(data, address)
    dsdt = table_at(data, struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    return found | {dsdt[:4]: dsdt}


def madt_entries(madt: bytes) -> list[bytes]:
    entries, place = [], 44
    while place < len(madt):
        entries.append(madt[place : place + madt[place + 1]])
        place += madt[place + 1]
    return entries


@pytest.mark.parametrize("vcpus", [1, 64, 255, 300])
def test_madt_lists_each_vcpu_once(vcpus: int) -> None:
    entries = madt_entries(tables(Platform(vcpus=vcpus))[b"APIC"])
    ids = [entry[3] for entry in entries if entry[0] == 0]
    ids += [struct.unpack_from("<I", entry, 4)[0] for entry in entries if entry[0] == 9]
    assert ids == list(range(vcpus))
    assert all(entry[1] == 8 and entry[4] == 1 for entry in entries if entry[0] == 0)
    assert all(entry[1] == 16 and entry[8] == 1 for entry in entries if entry[0] == 9)
    assert [struct.unpack("<2BB1x2I", entry) for entry in entries if entry[0] == 1] == [(1, 12, 0, 0xFEC0_0000, 0)]
    overrides = [struct.unpack("<4BIH", entry) for entry in entries if entry[0] == 2]
    assert overrides == [(2, 10, 0, 0, 2, 0)], "the interval timer, as the engine wires it (KVM's GSI 0 is pin 2)"
    assert any(entry[0] == 10 for entry in entries) == (vcpus > 255)


def test_fadt_is_hardware_reduced_and_has_reset_and_sleep() -> None:
    fadt = tables(Platform())[b"FACP"]
    assert (len(fadt), fadt[8]) == (276, 6)
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & (1 << 20 | 1 << 10) == (1 << 20 | 1 << 10)
    register = struct.Struct("<4BQ")
    assert register.unpack_from(fadt, 116) == (1, 8, 0, 1, 0xCF9)
    assert fadt[128] == 6
    assert register.unpack_from(fadt, 244)[4] == 0x600
    assert register.unpack_from(fadt, 256)[4] == 0x601


@pytest.mark.parametrize("i8042", [False, True])
@pytest.mark.parametrize("rtc", [False, True])
def test_fadt_says_which_old_devices_there_are(i8042: bool, rtc: bool) -> None:
    (flags,) = struct.unpack_from("<H", tables(Platform(i8042=i8042, rtc=rtc))[b"FACP"], 109)
    assert (bool(flags & 1 << 1), bool(flags & 1 << 5)) == (i8042, not rtc)


def test_mcfg_is_there_with_pci_only() -> None:
    assert struct.unpack("<QH2B4x", tables(Platform())[b"MCFG"][44:]) == (0xE000_0000, 0, 0, 255)
    assert b"MCFG" not in tables(Platform(pci=False))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"pci": False}, b"PCI0"),
        ({"serial": False}, b"COM1"),
        ({"rtc": False}, b"RTC_"),
        ({"i8042": False}, b"KBD_"),
        ({"pvpanic": False}, b"QEMU0001"),
    ],
)
def test_dsdt_has_the_devices_of_the_platform(change: dict[str, bool], name: bytes) -> None:
    assert name in tables(Platform(i8042=True))[b"DSDT"]
    assert name not in tables(Platform(**change))[b"DSDT"]  # type: ignore[arg-type]


def test_dsdt_has_the_virtio_mmio_slots() -> None:
    dsdt = tables(Platform(virtio_mmio=(1, 7)))[b"DSDT"]
    assert dsdt.count(b"LNRO0005") == 2
    assert struct.pack("<BHBII", 0x86, 9, 1, 0xFEB0_7000, 0x200) in dsdt


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x1_0000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integers_are_as_short_as_possible(value: int, expected: str) -> None:
    assert aml.integer(value).hex() == expected


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0x3F - 1, "3f"),
        (0x3F, "4104"),
        (0xFFF - 2, "4fff"),
        (0xFFF - 1, "810001"),
        (0xF_FFFF - 3, "8fffff"),
        (0xF_FFFF - 2, "c1000001"),
    ],
)
def test_package_lengths_count_themselves(size: int, head: str) -> None:
    term = aml.else_(bytes(size))
    assert term == b"\xa1" + bytes.fromhex(head) + bytes(size)


def test_names_and_identifiers() -> None:
    assert aml.path("\\_SB") == b"\\_SB_"
    assert aml.path("_SB.PCI0") == b"\x2e_SB_PCI0"
    assert aml.path("\\_SB.PCI0.COM1") == b"\\\x2f\x03_SB_PCI0COM1"
    assert aml.eisa_id("PNP0A03") == bytes.fromhex("0c41d00a03")  # as in the ACPI specification, 19.6.38
    assert aml.to_uuid("33db4d5b-1ff7-401c-9657-7441c03dd766")[-16:].hex() == "5b4ddb33f71f1c4096577441c03dd766"


@pytest.mark.parametrize(("vcpus", "pci"), [(1, True), (64, True), (64, False), (300, True)])
def test_mp_tables(vcpus: int, pci: bool) -> None:
    data = mp_tables(Platform(vcpus=vcpus, pci=pci), 0xF_0000)
    pointer, table = data[:16], data[16:]
    assert struct.unpack("<4sIBB", pointer[:10]) == (b"_MP_", 0xF_0010, 1, 4)
    assert sum(pointer) & 0xFF == sum(table) & 0xFF == 0
    signature, length, revision = struct.unpack_from("<4sHB", table)
    count, local_apic = struct.unpack_from("<HI", table, 34)
    assert (signature, length, revision, local_apic) == (b"PCMP", len(table), 4, 0xFEE0_0000)
    entries, place = [], 44
    while place < length:
        size = 20 if table[place] == 0 else 8
        entries.append(table[place : place + size])
        place += size
    assert len(entries) == count
    assert sorted(entry[0] for entry in entries) == [entry[0] for entry in entries], "in ascending order (4.3)"
    processors = [entry for entry in entries if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(min(vcpus, 254)))
    assert [entry[3] for entry in processors] == [3] + [1] * (len(processors) - 1)
    buses = {entry[2:8].strip(): entry[1] for entry in entries if entry[0] == 1}
    assert set(buses) == ({b"PCI", b"ISA"} if pci else {b"ISA"})
    wired = [struct.unpack("<2xH4B", entry) for entry in entries if entry[0] == 3]
    isa = [(source, pin) for _, bus, source, _, pin in wired if bus == buses[b"ISA"]]
    assert (4, 4) in isa
    assert (0, 2) in isa
    assert all(source == pin for source, pin in isa if source != 0)
    assert len({pin for _, pin in isa}) == len(isa), "no two of them share a pin"
    if pci:
        intx = {(source >> 2, source & 3): pin for _, bus, source, _, pin in wired if bus == buses[b"PCI"]}
        assert [intx[1, 0], intx[2, 0], intx[4, 0], intx[1, 1]] == [9, 10, 5, 10]
        assert all(flags == 0xF for flags, bus, *_ in wired if bus == buses[b"PCI"])


def test_tables_fit_their_places() -> None:
    slots = tuple(range(memory_map.VIRTIO_MMIO_SLOTS))
    platform = Platform(vcpus=300, virtio_mmio=slots)
    assert len(acpi_tables(platform, BASE, GIB)) <= 0x1_0000
    assert len(mp_tables(platform, 0xF_0000)) <= 0xFFF0


def test_ram_regions() -> None:
    assert memory_map.ram_regions(512 * MIB) == [(0, 512 * MIB)]
    assert memory_map.ram_regions(3 * GIB) == [(0, 3 * GIB)]
    assert memory_map.ram_regions(3 * GIB + 4096) == [(0, 3 * GIB), (4 * GIB, 4096)]
    for size in (0, -4096, 4095):
        with pytest.raises(ValueError, match="allowed is a multiple of 4096"):
            memory_map.ram_regions(size)


def test_pci_window_64_is_above_all_ram() -> None:
    assert memory_map.pci_window_64(GIB) == 16 * GIB
    assert memory_map.pci_window_64(15 * GIB) == 16 * GIB
    assert memory_map.pci_window_64(15 * GIB + 4096) == 17 * GIB


def test_slots_and_pins() -> None:
    assert memory_map.virtio_mmio_slot(7) == (0xFEB0_7000, 23)
    with pytest.raises(ValueError, match="there are 0 to 7"):
        memory_map.virtio_mmio_slot(8)
    assert [memory_map.pci_intx_gsi(device) for device in range(5)] == [5, 9, 10, 11, 5]


def test_a_power_button_notifies_by_its_interrupt() -> None:
    """By the generic event device, as a hardware-reduced platform has no fixed button."""
    dsdt = tables(Platform())[b"DSDT"]
    events = dsdt[dsdt.index(b"GED_") :]
    assert b"ACPI0013" in events
    assert aml.edge_interrupt(memory_map.POWER_BUTTON_GSI) in events
    assert b"_EVT\x09\x86\\\x2e_SB_PWRB\x0a\x80" in events, "Notify (\\_SB.PWRB, 0x80)"
    assert b"PWRB\x08_HID" + aml.eisa_id("PNP0C0C") in dsdt
