"""Flat guests on this host's KVM, with devices written in Python."""

from __future__ import annotations

from vmm.flat import Flat, Registers

OUT_10_AL, IN_AL_10, HLT = bytes([0xE6, 0x10]), bytes([0xE4, 0x10]), bytes([0xF4])


def test_a_python_device_answers_reads_and_takes_writes() -> None:
    device = Registers([b"\x5a"])
    guest = Flat(IN_AL_10 + OUT_10_AL + HLT)
    guest.vm.add_pio(0x10, 1, device)
    guest.vm.start()
    guest.wait("halted")
    assert device.writes == [(0, b"\x5a")]
    assert device.reads == [(0, 1)]
    guest.close()
