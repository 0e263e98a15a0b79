"""The devices of a PC, used by flat guests on this host's KVM."""

from __future__ import annotations

import datetime
import json
import queue
import select
import sys
import time

import pytest

from viaduct._core import I8042, DebugExit, Pvpanic, ResetControl, Rtc, Serial, SleepControl
from viaduct.vmm import memory_map
from vmm.flat import PATIENCE, Flat, until

HLT = b"\xf4"
HANG = b"\xeb\xfe"
SERIAL = memory_map.SERIAL_PORT
IRQ = memory_map.SERIAL_GSI


def out(port: int, value: int) -> bytes:
    """MOV DX, port; MOV AL, value; OUT DX, AL."""
    return b"\xba" + port.to_bytes(2, "little") + bytes([0xB0, value, 0xEE])


def read(port: int, to: int) -> bytes:
    """MOV DX, port; IN AL, DX; MOV [to], AL."""
    return b"\xba" + port.to_bytes(2, "little") + b"\xec\xa2" + to.to_bytes(2, "little")


class Requests:
    """What devices asked for."""

    def __init__(self) -> None:
        self._asked: queue.Queue[tuple[str, str, int]] = queue.Queue()

    def __call__(self, device: str, request: str, value: int) -> None:
        self._asked.put((device, request, value))

    def next(self) -> tuple[str, str, int]:
        return self._asked.get(timeout=PATIENCE)


def said(serial: Serial, size: int) -> bytes:
    """The next `size` bytes that the guest writes."""
    text = b""
    deadline = time.monotonic() + PATIENCE
    while len(text) < size:
        assert time.monotonic() < deadline, text
        if select.select([serial.event_fd], [], [], 1)[0]:
            more, lost = serial.take_output()
            assert lost == 0
            text += more
    return text


def test_a_guest_says_hello() -> None:
    text = b"hello, world\n"
    with Flat(b"".join(out(SERIAL, byte) for byte in text) + HLT, interrupts="kernel") as guest:
        serial = Serial(guest.vm, IRQ)
        assert serial.name == "serial"
        guest.vm.add_pio(SERIAL, 8, serial)
        guest.vm.start()
        assert said(serial, len(text)) == text


def test_of_what_nobody_reads_the_end_is_kept() -> None:
    loop = b"\xba" + SERIAL.to_bytes(2, "little") + b"\xb9\xe8\x03" + b"\xb0a\xee\xe2\xfb" + out(SERIAL, ord("b")) + HLT
    with Flat(loop, interrupts="kernel") as guest:
        serial = Serial(guest.vm, IRQ, output_limit=10)
        guest.vm.add_pio(SERIAL, 8, serial)
        guest.vm.start()
        total, text = 0, b""
        deadline = time.monotonic() + PATIENCE
        while not text.endswith(b"b"):
            assert time.monotonic() < deadline
            text, lost = serial.take_output()
            assert len(text) <= 10
            total += len(text) + lost
        assert total == 1001


def test_a_guest_that_waits_for_an_interrupt_is_told_of_input() -> None:
    """The interrupt is an edge, so its handler goes on until nothing is left, as every driver's does."""
    handler_at = 0x2000
    handler = (
        # Until the line status says that there is no more: read, add one, write.
        bytes.fromhex("bafd03 ec a801 7408 baf803 ec 40 ee ebf0")
        # End of interrupt, return.
        + bytes.fromhex("b020 e620 cf")
    )
    setup = (
        # The first controller: vectors from 8, interrupt 4 let through.
        bytes.fromhex("b011e620 b008e621 b004e621 b001e621 b0efe621")
        # Vector 12.
        + bytes.fromhex("c7063000")
        + handler_at.to_bytes(2, "little")
        + bytes.fromhex("c70632000000")
        + out(SERIAL + 2, 1)
        + out(SERIAL + 1, 1)
        + out(SERIAL, ord("!"))
        # STI, HLT, again.
        + bytes.fromhex("fb f4 ebfd")
    )
    with Flat(setup, interrupts="kernel") as guest:
        guest.memory.write(handler_at, handler)
        serial = Serial(guest.vm, IRQ)
        guest.vm.add_pio(SERIAL, 8, serial)
        guest.vm.start()
        assert said(serial, 1) == b"!"
        for text in (b"abc", b"x" * 100, bytes(range(200))):
            assert serial.input(text) == len(text)
            assert said(serial, len(text)) == bytes((byte + 1) & 0xFF for byte in text)
        until(lambda: serial.unread == 0)


def test_a_small_kernel_ends_with_a_value() -> None:
    requests = Requests()
    with Flat(b"\x66\xb8\x78\x56\x34\x12\x66\xe7\xf4" + HLT) as guest:
        guest.vm.add_pio(memory_map.DEBUG_EXIT_PORT, 4, DebugExit(requests))
        guest.vm.start()
        assert requests.next() == ("debug-exit", "exit", 0x12345678)


@pytest.mark.parametrize(
    ("kind", "port", "size", "written", "asked"),
    [
        (Pvpanic, memory_map.PVPANIC_PORT, 1, [(0, 1)], ("pvpanic", "panicked", 0)),
        (Pvpanic, memory_map.PVPANIC_PORT, 1, [(0, 2)], ("pvpanic", "crash-loaded", 0)),
        (I8042, memory_map.I8042_DATA, 5, [(4, 0xFE)], ("i8042", "reset", 0)),
        (ResetControl, memory_map.RESET_PORT, 1, [(0, 2), (0, 6)], ("reset-control", "reset", 0)),
        (SleepControl, memory_map.SLEEP_CONTROL_PORT, 2, [(0, 0x34)], ("sleep-control", "power-off", 0)),
    ],
)
def test_what_a_guest_asks_of_the_whole_machine(
    kind: type[Pvpanic] | type[I8042] | type[ResetControl] | type[SleepControl],
    port: int,
    size: int,
    written: list[tuple[int, int]],
    asked: tuple[str, str, int],
) -> None:
    requests = Requests()
    with Flat(b"".join(out(port + offset, value) for offset, value in written) + HLT) as guest:
        guest.vm.add_pio(port, size, kind(requests))
        guest.vm.start()
        assert requests.next() == asked


def test_the_clock_shows_the_hosts_date() -> None:
    fields = (0x32, 0x09, 0x08, 0x07, 0x04, 0x02)
    found = 0x3000
    code = out(0x70, 0x0B) + out(0x71, 0x06)
    for number, index in enumerate(fields):
        code += out(0x70, index) + read(0x71, found + number)
    code += out(memory_map.DEBUG_EXIT_PORT, 0) + HLT

    def now() -> list[int]:
        date = datetime.datetime.now(datetime.UTC)
        return [date.year // 100, date.year % 100, date.month, date.day, date.hour, date.minute]

    # Again, if a minute ended meanwhile.
    while True:
        before = now()
        requests = Requests()
        with Flat(code) as guest:
            guest.vm.add_pio(memory_map.RTC_PORT, 2, Rtc())
            guest.vm.add_pio(memory_map.DEBUG_EXIT_PORT, 4, DebugExit(requests))
            guest.vm.start()
            requests.next()
            shown = list(guest.memory.read(found, len(fields)))
        if now() == before:
            assert shown == before
            return


def test_states_are_kept_and_damaged_ones_refused() -> None:
    with Flat(HANG, interrupts="kernel") as guest:
        serial = Serial(guest.vm, IRQ)
        serial.input(b"unread")
        restored = Serial(guest.vm, IRQ)
        restored.restore(serial.save())
        assert restored.unread == 6
        restored.reset()
        with pytest.raises(ValueError, match="serial"):
            restored.restore(b"{}")
        state = json.loads(serial.save()) | {"fifo": [0] * 17}
        with pytest.raises(ValueError, match="17 bytes in a FIFO of 16"):
            restored.restore(json.dumps(state).encode())
        with pytest.raises(ValueError, match="interrupt 99"):
            Serial(guest.vm, 99)
    for device in (I8042(Requests()), ResetControl(Requests()), SleepControl(Requests()), Rtc()):
        device.restore(device.save())
        with pytest.raises(ValueError, match=device.name):
            device.restore(b"[]")


def test_what_a_callback_raises_is_reported_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda problem: reported.append(problem.exc_value))

    def fail(device: str, request: str, value: int) -> None:
        raise RuntimeError("an owner that fails")

    requests = Requests()
    with Flat(out(memory_map.PVPANIC_PORT, 1) + out(memory_map.DEBUG_EXIT_PORT, 3) + HLT) as guest:
        guest.vm.add_pio(memory_map.PVPANIC_PORT, 1, Pvpanic(fail))
        guest.vm.add_pio(memory_map.DEBUG_EXIT_PORT, 4, DebugExit(requests))
        guest.vm.start()
        assert requests.next() == ("debug-exit", "exit", 3)
    assert [str(problem) for problem in reported] == ["an owner that fails"]
