"""The table of exits: sums, differences, and what a real guest leaves in it."""

from __future__ import annotations

import io

from rich.console import Console

from viaduct._core import Rtc
from viaduct.vmm.exit_report import Exits, Row
from vmm.flat import Flat, Registers


def text(exits: Exits, limit: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(exits.table(limit))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


ROWS = [
    (0, "port write", 0x3F8, "serial", 10, 5000),
    (1, "port write", 0x3F8, "serial", 20, 5000),
    (0, "mmio read", 0xFEB00000, "", 1, 90000),
    (0, "interrupted", None, "", 2, 10),
]


def test_vcpus_are_summed_and_the_longest_is_first() -> None:
    exits = Exits.summed(ROWS, [100, 200])
    assert exits.rows() == [
        Row("mmio read", 0xFEB00000, "", 1, 90e-6),
        Row("port write", 0x3F8, "serial", 30, 10e-6),
        Row("interrupted", None, "", 2, 10e-9),
    ]
    assert exits.total == 33
    assert exits.guest_nanoseconds == 300


def test_a_difference_has_only_what_came_after() -> None:
    before = Exits.summed(ROWS[:2], [100])
    after = Exits.summed([*ROWS[:2], (0, "port write", 0x3F8, "serial", 1, 7), ROWS[2]], [150])
    between = after.since(before)
    assert between.counts == {("port write", 0x3F8, "serial"): (1, 7), ("mmio read", 0xFEB00000, ""): (1, 90000)}
    assert between.guest_nanoseconds == 50


def test_the_table_says_what_it_leaves_out() -> None:
    shown = text(Exits.summed(ROWS, [0]), limit=1)
    assert "nobody" in shown
    assert "2 more" in shown
    assert "0x3f8" not in shown
    assert "0x3f8" in text(Exits.summed(ROWS, [0]))


def test_a_guest_s_exits_are_counted_by_port_and_device() -> None:
    # mov cx, 100; out 0x10, al; loop; in al, 0x20; hlt
    with Flat(bytes([0xB9, 100, 0, 0xE6, 0x10, 0xE2, 0xFC, 0xE4, 0x20, 0xF4])) as guest:
        guest.vm.add_pio(0x10, 1, Registers(), "mine")
        guest.vm.start()
        guest.wait("halted")
        exits = Exits.of(guest.vm)
        assert exits.counts["port write", 0x10, "mine"][0] == 100
        assert exits.counts["port read", 0x20, ""][0] == 1
        assert exits.guest_nanoseconds > 0
        assert "mine" in text(exits)


def test_posted_writes_are_shown_and_are_no_exits() -> None:
    # mov cx, 100; mov al, 0x0D; out 0x70, al; in al, 0x71; loop to mov al; hlt
    code = bytes([0xB9, 100, 0, 0xB0, 0x0D, 0xE6, 0x70, 0xE4, 0x71, 0xE2, 0xF8, 0xF4])
    with Flat(code) as guest:
        guest.vm.add_pio(0x70, 2, Rtc())
        guest.vm.start()
        guest.wait("halted")
        exits = Exits.of(guest.vm)
        assert exits.counts["posted write", 0x70, "rtc"][0] == 100
        assert exits.counts["port read", 0x71, "rtc"][0] == 100
        assert ("port write", 0x70, "rtc") not in exits.counts
        assert exits.total == 101, exits.counts
        assert "posted write" in text(exits)
        assert guest.vm.registers(0)["rax"] & 0xFF == 0x80, "the byte that each write was for: the battery is good"
