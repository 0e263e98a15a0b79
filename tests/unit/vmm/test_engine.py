"""Flat guests on this host's KVM, with devices written in Python, and the life of a machine from Python."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import threading

import pytest

from viaduct._core import BusDevice, GuestMemory, Vm
from vmm.flat import CODE, PATIENCE, Flat, Registers, ram, until

OUT_10_AL, OUT_10_AX, IN_AL_10, IN_AX_10, HLT = b"\xe6\x10", b"\xe7\x10", b"\xe4\x10", b"\xe5\x10", b"\xf4"
COUNT = bytes([0x66, 0xFF, 0x06, 0x00, 0x08, 0xEB, 0xF9])  # inc dword [0x800]; jmp to it


def counter(guest: Flat) -> int:
    return int.from_bytes(guest.memory.read(0x800, 4), "little")


@pytest.mark.parametrize("answer", [b"\x5a", 0x5A])
def test_a_python_device_answers_reads_and_takes_writes(answer: bytes | int) -> None:
    device = Registers([answer])
    with Flat(IN_AL_10 + OUT_10_AL + HLT) as guest:
        guest.vm.add_pio(0x10, 1, device)
        guest.vm.start()
        guest.wait("halted")
        assert device.writes == [(0, b"\x5a")]
        assert device.reads == [(0, 1)]


def test_a_python_device_at_an_address() -> None:
    # mov ax, 0xB800; mov ds, ax; mov eax, [4]; mov [8], eax; hlt
    code = bytes([0xB8, 0x00, 0xB8, 0x8E, 0xD8, 0x66, 0xA1, 0x04, 0x00, 0x66, 0xA3, 0x08, 0x00, 0xF4])
    device = Registers([0x12345678])
    with Flat(code, memory=1 << 19) as guest:
        guest.vm.add_mmio(0xB8000, 16, device, "mine")
        guest.vm.start()
        guest.wait("halted")
        assert device.reads == [(4, 4)]
        assert device.writes == [(8, b"\x78\x56\x34\x12")]


@pytest.mark.parametrize("answer", [b"", b"abc", -1, 0x10000, "no", None, 1.5, ZeroDivisionError("mine")])
def test_what_a_python_device_does_wrong_reads_as_ones_and_is_told(
    answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bytes] = []

    class Wrong:
        def read(self, offset: int, size: int) -> bytes:
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[return-value]

        def write(self, offset: int, data: bytes) -> None:
            seen.append(data)
            raise RuntimeError("nor this")

    with caplog.at_level(logging.ERROR, "viaduct.vmm"), Flat(IN_AX_10 + OUT_10_AX + HLT) as guest:
        guest.vm.add_pio(0x10, 2, Wrong(), "wrong")
        guest.vm.start()
        first = guest.wait("device-error")
        second = guest.wait("device-error")
        guest.wait("halted")
    assert seen == [b"\xff\xff"]
    assert (first["device"], first["failures"], second["failures"]) == ("wrong", 1, 2)
    assert "read of 2 bytes at 0x0" in first["error"]
    assert "nor this" in second["error"]
    assert "wrong: read of 2 bytes" in caplog.text


def test_a_device_that_fails_for_ever_is_not_told_for_ever() -> None:
    # out 0x10, al; jmp to it
    class Failing(Registers):
        def write(self, offset: int, data: bytes) -> None:
            super().write(offset, data)
            raise RuntimeError

    device = Failing()
    with Flat(b"\xe6\x10\xeb\xfc") as guest:
        guest.vm.add_pio(0x10, 1, device)
        guest.vm.start()
        until(lambda: len(device.writes) > 1000)
        guest.vm.request_pause()
        guest.wait("paused")
        told = sum(kind == "device-error" for kind, _ in list(guest.events.queue))
        assert told <= len(device.writes).bit_length()


def test_an_object_that_is_no_device_is_refused() -> None:
    with Flat(HLT) as guest:
        with pytest.raises(TypeError, match="no method read"):
            guest.vm.add_pio(0x10, 1, object())  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            BusDevice()


def test_ranges_that_overlap_are_refused_by_name() -> None:
    with Flat(HLT) as guest:
        guest.vm.add_pio(0x10, 4, Registers(), "first")
        with pytest.raises(ValueError, match="second at 0x13-0x16 overlaps first"):
            guest.vm.add_pio(0x13, 4, Registers(), "second")
        guest.vm.remove_pio(0x10)
        guest.vm.add_pio(0x13, 4, Registers(), "second")
        with pytest.raises(ValueError, match="no range"):
            guest.vm.remove_mmio(0x13)


def test_the_interpreter_is_free_while_a_guest_runs() -> None:
    with Flat(COUNT) as guest:
        guest.vm.start()
        before = counter(guest)
        assert sum(range(100_000)) > 0
        until(lambda: counter(guest) > before)


def test_pauses_and_resumes() -> None:
    with Flat(COUNT) as guest:
        guest.vm.start()
        for _ in range(100):
            guest.vm.request_pause()
            guest.wait("paused")
            assert guest.vm.paused
            before = counter(guest)
            rip = guest.vm.registers(0)["rip"]
            assert rip in (CODE, CODE + 5)
            assert counter(guest) == before
            guest.vm.resume()
        assert not guest.vm.paused
        with pytest.raises(ValueError, match="pause the machine"):
            until(lambda: guest.vm.registers(0) is None)


def test_registers_by_name() -> None:
    with Flat(HLT, interrupts="kernel") as guest:
        values = {"rax": 1 << 63, "r15": 7, "cr3": 0x5000, "gdt": (0x6000, 23), "rflags": 0x46}
        segment = (0x10, 0x1234, 0xFFFF, 3, 0, 1, 0, 0, 1, 0)
        guest.vm.set_registers(0, values | {"ds": segment})
        found = guest.vm.registers(0)
        assert {name: found[name] for name in values} == values
        assert found["ds"] == segment
        for wrong, error in (({"eax": 1}, KeyError), ({"rax": -1}, ValueError), ({"cs": (1, 2)}, ValueError)):
            with pytest.raises(error):
                guest.vm.set_registers(0, wrong)
        with pytest.raises(ValueError, match="vCPU 1"):
            guest.vm.registers(1)


def test_what_cannot_be_executed_is_told_with_its_place() -> None:
    with Flat(b"\xea\x00\x00\x00\xb8", memory=1 << 19) as guest:  # jmp 0xB800:0
        guest.vm.start()
        detail = guest.wait("failed")
        assert detail["address"] == 0xB8000
        assert detail["vcpu"] == 0
        assert detail["reason"]
        guest.wait("paused")


def test_save_restore_and_reset() -> None:
    with Flat(COUNT, vcpus=2, interrupts="kernel") as guest:
        guest.vm.start()
        until(lambda: counter(guest) > 10)
        with pytest.raises(ValueError, match="pause"):
            guest.vm.save()
        guest.vm.request_pause()
        guest.wait("paused")
        state = guest.vm.save()
        assert len(json.loads(state)["vcpus"]) == 2
        with Flat(COUNT, vcpus=2, interrupts="kernel") as other:
            other.vm.restore(state)
            assert other.vm.registers(0) == guest.vm.registers(0)
            other.vm.start()
            until(lambda: counter(other) > 10)
            for wrong in ("", "{}", "[]", "\0", '{"vm": {}, "vcpus": [1, 2]}'):
                with pytest.raises(ValueError, match=r"state"):
                    other.vm.restore(wrong)
        guest.vm.reset()
        assert guest.vm.registers(0)["rip"] == 0xFFF0
        guest.set_start(0)
        before = counter(guest)
        guest.vm.resume()
        until(lambda: counter(guest) > before)


def test_written_pages_are_told() -> None:
    with Flat(COUNT) as guest:
        with pytest.raises(ValueError, match="nobody has asked"):
            guest.vm.take_dirty_pages()
        guest.vm.log_dirty_pages(True)
        guest.vm.start()
        until(lambda: counter(guest) > 10)
        guest.vm.request_pause()
        guest.wait("paused")
        assert guest.vm.take_dirty_pages() == [0]
        assert guest.vm.take_dirty_pages() == []
        guest.vm.log_dirty_pages(False)
        with pytest.raises(ValueError, match="nobody has asked"):
            guest.vm.take_dirty_pages()
        # And again from the beginning.
        guest.vm.log_dirty_pages(True)
        before = counter(guest)
        guest.vm.resume()
        until(lambda: counter(guest) > before)
        guest.vm.request_pause()
        guest.wait("paused")
        assert guest.vm.take_dirty_pages() == [0]


def test_written_pages_are_told_by_rings() -> None:
    # mov ax, 0x2000; mov ds, ax; mov [0x1000], al; hlt; mov [0x3000], al; hlt
    code = bytes([0xB8, 0x00, 0x20, 0x8E, 0xD8, 0xA2, 0x00, 0x10, 0xF4, 0xA2, 0x00, 0x30, 0xF4])
    with Flat(code, dirty_ring=1024) as guest:
        guest.vm.log_dirty_pages(True)
        guest.vm.start()
        guest.wait("halted")
        assert guest.vm.take_dirty_pages() == [0x21000]
        assert guest.vm.take_dirty_pages() == []
        guest.vm.resume()
        guest.wait("halted")
        assert guest.vm.take_dirty_pages() == [0x23000]
        guest.vm.log_dirty_pages(False)
        with pytest.raises(ValueError, match="nobody has asked"):
            guest.vm.take_dirty_pages()


def test_a_ring_of_written_pages_has_a_size_that_can_be() -> None:
    for entries in (0, 1000, 1 << 31):
        with pytest.raises(ValueError, match="a power of two up to"):
            Flat(COUNT, dirty_ring=entries)


def test_gdb_attaches_before_the_first_instruction() -> None:
    with Flat(COUNT) as guest:
        guest.vm.start(paused=True)
        guest.wait("paused")
        assert guest.vm.gdb is None
        port = guest.vm.serve_gdb(0, wait=True)
        assert guest.vm.gdb == "awaited"
        with pytest.raises(ValueError, match="already"):
            guest.vm.serve_gdb(0)
        commands = [
            "set architecture i386:x86-64",
            f"target remote 127.0.0.1:{port}",
            "p/x $rip",
            "p/x *(int *) 0x1000",
        ]
        gdb = ["gdb", "--nx", "--batch", *(word for command in commands for word in ("-ex", command))]
        said = subprocess.run(gdb, capture_output=True, text=True, timeout=PATIENCE).stdout
        assert f"= {CODE:#x}" in said
        assert "= 0x6ff66" in said
        assert guest.vm.gdb == "absent"
        until(lambda: counter(guest) > 10)


@pytest.mark.parametrize("vcpus", [0, 65])
def test_too_many_vcpus_are_refused(vcpus: int) -> None:
    with pytest.raises(ValueError, match="allowed are 1 to 64"):
        Vm("kvm", ram(1 << 20), vcpus)


def test_memory_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="needs memory"):
        Vm("kvm", GuestMemory(), 1)
    with pytest.raises(ValueError, match="multiples of 0x1000"):
        Vm("kvm", ram(5000), 1)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="there is kvm"):
        Vm("tcg", ram(1 << 20), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel, split and none"):
        Vm("kvm", ram(1 << 20), 1, interrupts="pic")  # type: ignore[arg-type]
    with Flat(HLT) as guest, pytest.raises(RuntimeError, match="without interrupt controllers"):
        guest.vm.set_line(4, True)


def test_an_exception_in_the_callback_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException | None] = []
    monkeypatch.setattr("sys.unraisablehook", lambda problem: raised.append(problem.exc_value))
    halted = threading.Event()

    def on_event(kind: str, detail: dict[str, object]) -> None:
        halted.set()
        raise ZeroDivisionError(kind)

    memory = ram(1 << 20)
    memory.write(0xFFFF0, HLT)
    vm = Vm("kvm", memory, 1, interrupts="none", on_event=on_event)
    vm.set_registers(0, {"cs": (0xF000, 0xF0000, 0xFFFF, 0xB, 0, 1, 0, 0, 1, 0)})
    vm.start()
    assert halted.wait(PATIENCE)
    vm.close()
    assert [str(error) for error in raised] == ["halted"]


def test_a_machine_that_is_forgotten_ends_its_threads() -> None:
    """Its owner and the machine refer to each other, as owners and machines do."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    gc.collect()
    before = threads()
    guests = [Flat(COUNT) for _ in range(3)]
    for guest in guests:
        guest.vm.start()
    until(lambda: threads() >= before + 3)
    del guest, guests
    gc.collect()
    until(lambda: threads() == before)


def test_a_machine_stops_in_the_middle_of_a_python_device() -> None:
    entered = threading.Event()

    class Waiting(Registers):
        def write(self, offset: int, data: bytes) -> None:
            entered.set()
            super().write(offset, data)

    guest = Flat(OUT_10_AL * 100 + b"\xeb\xfe")
    guest.vm.add_pio(0x10, 1, Waiting())
    guest.vm.start()
    assert entered.wait(PATIENCE)
    guest.close()
