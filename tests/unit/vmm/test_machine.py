"""A machine from the outside: its life, its console, what its guest asks of it, and snapshots. On this host's KVM."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from viaduct import Machine
from viaduct.devices.console_terminal import INPUT_MAX
from viaduct.switch.control_client import ControlClient
from viaduct.switch.control_wire import ControlError
from viaduct.vmm import directory
from viaduct.vmm.errors import MachineError
from viaduct.vmm.machine import MachineEnd

PATIENCE = 60

ECHO = bytes.fromhex(
    "ba fd 03"  # mov dx, 0x3fd     line status
    "ec a8 01 74 fb"  # 1: in al, dx; test al, 1; jz 1b
    "ba f8 03 ec"  # mov dx, 0x3f8; in al, dx
    "fe c0 ee"  # inc al; out dx, al
    "eb ef"  # jmp to the beginning
)
"""Answers each byte on the serial port with the next one."""
COUNT = bytes.fromhex(
    "ba f8 03"  # mov dx, 0x3f8
    "b0 30 ee"  # 1: mov al, '0'; 2: out dx, al
    "b9 40 9c 49 75 fd"  # mov cx, 40000; 3: dec cx; jnz 3b
    "fe c0 3c 3a 75 f3 eb ef"  # inc al; cmp al, ':'; jne 2b; jmp 1b
)
"""Writes digits to the serial port, over and over."""


def out(port: int, value: int) -> bytes:
    """mov dx, port; mov al, value; out dx, al."""
    return b"\xba" + port.to_bytes(2, "little") + b"\xb0" + bytes([value]) + b"\xee"


HALT = b"\xf4\xeb\xfd"
NOWHERE = bytes.fromhex("ea 00 00 00 b8")
"""jmp 0xb800:0."""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of their own for these machines' sockets."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
async def machines() -> AsyncIterator[list[Machine]]:
    """Closes what a test puts in."""
    made: list[Machine] = []
    yield made
    for machine in made:
        await machine.close()


def flat(tmp_path: Path, code: bytes, **fields: Any) -> Machine:
    kernel = tmp_path / "kernel.bin"
    kernel.write_bytes(code)
    return Machine(**{"kernel": str(kernel), "boot": "flat", "memory": "4M", **fields})


async def end_of(machine: Machine) -> MachineEnd:
    async with asyncio.timeout(PATIENCE):
        return await machine.wait()


async def test_the_console_goes_both_ways(tmp_path: Path, machines: list[Machine]) -> None:
    machine = flat(tmp_path, ECHO)
    machines.append(machine)
    machine.start()
    machine.console.write("HAL")
    assert await machine.console.expect("IBM", PATIENCE) == "IBM"
    await machine.stop()
    assert (await end_of(machine)).reason == "stopped"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (out(0xF4, 42), ("exit", 42)),
        (out(0x600, 0x34), ("shutdown", 0)),
        (out(0xCF9, 6), ("reset", 0)),
        (out(0x64, 0xFE), ("reset", 0)),
        (out(0x505, 1) + out(0xCF9, 6), ("reset", 1)),
    ],
    ids=["debug-exit", "sleep control", "reset control", "i8042", "panic and reset control"],
)
async def test_a_guest_ends_its_machine(
    tmp_path: Path, machines: list[Machine], code: bytes, end: tuple[str, int]
) -> None:
    machine = flat(tmp_path, code + HALT, on_reset="stop")
    machines.append(machine)
    found = await end_of(machine)
    assert (found.reason, found.code) == end


def config_byte(offset: int, mask: int = 0xFF) -> bytes:
    """Ends the machine with a byte of the configuration space of PCI device 1."""
    address = 0x8000_0800 | offset & ~3
    return (
        (
            b"\xba\xf8\x0c\x66\xb8" + address.to_bytes(4, "little") + b"\x66\xef"  # mov dx, 0xCF8; mov eax; out
            b"\xba" + (0xCFC + offset % 4).to_bytes(2, "little") + b"\xec"  # mov dx, ...; in al, dx
            b"\x24" + bytes([mask]) + b"\xe6\xf4"  # and al, mask; out 0xF4, al
        )
        + HALT
    )


DEVICE_ID, PORT_NOTIFY_BAR, IS_PORTS = 2, 0x18, 1
PIC_MASK = b"\xe4\x21\xe6\xf4" + HALT
"""in al, 0x21; out 0xF4, al: 0 after power-on, 255 without a PIC."""


@pytest.mark.parametrize(
    ("code", "fields", "seen"),
    [
        (config_byte(DEVICE_ID), {}, 0x44),
        (config_byte(DEVICE_ID), {"transitional": True}, 0x05),
        (config_byte(DEVICE_ID), {"transitional": True, "rng": False, "vsock": "vsock"}, 0x53),
        (config_byte(PORT_NOTIFY_BAR, IS_PORTS), {}, 0),
        (config_byte(PORT_NOTIFY_BAR, IS_PORTS), {"port_notify": True}, 1),
        (PIC_MASK, {}, 0),
        (PIC_MASK, {"interrupts": "split"}, 255),
    ],
)
async def test_a_guest_sees_what_is_configured(
    tmp_path: Path,
    machines: list[Machine],
    monkeypatch: pytest.MonkeyPatch,
    code: bytes,
    fields: dict[str, Any],
    seen: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    machine = flat(tmp_path, code, **fields)
    machines.append(machine)
    found = await end_of(machine)
    assert (found.reason, found.code) == ("exit", seen)


POWER_BUTTON = bytes.fromhex(
    "31 c0 8e d8 8e d0 bc 00 70"  # xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000
    "e8 00 00 5b 83 c3 2a"  # call to the next; pop bx; add bx, handler - here
    "89 1e 38 00 8c 0e 3a 00"  # mov [4 * 14], bx; mov [4 * 14 + 2], cs
    "b0 11 e6 20 b0 08 e6 21 b0 04 e6 21 b0 01 e6 21"  # the PIC: vectors from 8
    "b0 bf e6 21"  # all masked but 6
    "ba f8 03 b0 72 ee"  # mov dx, 0x3f8; mov al, 'r'; out dx, al
    "fb f4 eb fd"  # sti; hlt; jmp to it
    "b0 42 e6 f4 f4 eb fd"  # handler: mov al, 0x42; out 0xf4, al; hlt
)
"""Ends the machine with 0x42 when its power button is pressed."""


async def test_a_guest_hears_of_its_power_button(tmp_path: Path, machines: list[Machine]) -> None:
    machine = flat(tmp_path, POWER_BUTTON, name="button")
    machines.append(machine)
    await machine.start()
    await machine.console.expect("r", PATIENCE)

    def press() -> None:
        with ControlClient(directory.machines_directory() / "button" / directory.CONTROL) as client:
            client.call("power-button")

    await asyncio.to_thread(press)
    found = await end_of(machine)
    assert (found.reason, found.code) == ("exit", 0x42)
    assert any(event.kind == "power-button" for event in machine.events)
    with pytest.raises(MachineError, match="it has to run for that"):
        await machine.press_power_button()


async def test_a_reset_begins_anew(tmp_path: Path, machines: list[Machine]) -> None:
    """The first thing that the guest does is to say so, and the second to reset its machine."""
    machine = flat(tmp_path, out(0x3F8, ord("x")) + out(0xCF9, 6) + HALT)
    machines.append(machine)
    await machine.start()
    for _ in range(3):
        await machine.console.expect("x", PATIENCE)
    assert any(event.kind == "reset" for event in machine.events)


async def test_a_reset_leaves_nothing_behind(tmp_path: Path, machines: list[Machine]) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    machine = flat(tmp_path, COUNT, disks=[str(disk)], balloon=True)
    machines.append(machine)
    await machine.start()
    before = weakref.ref(machine._board)
    descriptors = 0
    for round_ in range(5):
        await machine.reset()
        if round_ == 0:
            descriptors = len(os.listdir("/proc/self/fd"))
    gc.collect()
    assert before() is None
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


async def test_a_panic_is_told_and_the_guest_goes_on(tmp_path: Path, machines: list[Machine]) -> None:
    machine = flat(tmp_path, out(0x505, 1) + out(0xF4, 1) + HALT)
    machines.append(machine)
    await end_of(machine)
    assert "panic" in [event.kind for event in machine.events]


async def test_pause_stands_still(tmp_path: Path, machines: list[Machine]) -> None:
    machine = flat(tmp_path, COUNT)
    machines.append(machine)
    await machine.start()
    await machine.console.expect("789", PATIENCE)
    await machine.pause()
    await asyncio.sleep(0.1)  # what was written before comes
    written = machine.console.end
    await asyncio.sleep(0.3)
    assert machine.console.end == written
    await machine.resume()
    await machine.console.expect("789", PATIENCE)


async def test_more_is_typed_than_the_serial_port_holds(tmp_path: Path, machines: list[Machine]) -> None:
    """The guest is asked for nothing while it stands still, and then reads all of it: nobody has to press a key."""
    machine = flat(tmp_path, ECHO)
    machines.append(machine)
    await machine.start(paused=True)
    for _ in range(3):
        await until(lambda: machine.console.input_room == INPUT_MAX or machine.console.input_waiting > 0, "it is taken")
        machine.console.write("H" * machine.console.input_room)
    assert machine.console.input_waiting > 0
    await machine.resume()
    await until(lambda: machine.console.input_waiting == 0, "the guest reads all")
    await machine.console.expect("I" * 1000, PATIENCE)


async def test_machines_are_found_by_name(tmp_path: Path, machines: list[Machine]) -> None:
    first, second = flat(tmp_path, COUNT, name="web"), flat(tmp_path, COUNT)
    machines += [first, second]
    await first.start()
    await second.start()
    assert directory.running() == ["vm1", "web"]
    with pytest.raises(MachineError, match="a machine named web is running"):
        await flat(tmp_path, COUNT, name="web").start()

    def ask(method: str) -> object:
        with ControlClient(directory.machines_directory() / "web" / directory.CONTROL) as client:
            return client.call(method)

    status = await asyncio.to_thread(ask, "status")
    assert isinstance(status, dict)
    assert (status["state"], status["cpus"], status["memory"]) == ("running", 1, 4 << 20)
    await asyncio.to_thread(ask, "pause")
    assert first.state == "paused"
    await asyncio.to_thread(ask, "resume")
    exits = await asyncio.to_thread(ask, "exits")
    assert isinstance(exits, dict)
    assert any(row[2] == "serial" and row[3] > 0 for row in exits["rows"])
    with pytest.raises(ControlError, match="unknown method"):
        await asyncio.to_thread(ask, "explode")
    await asyncio.to_thread(ask, "stop")
    assert (await end_of(first)).reason == "stopped"
    await first.close()
    assert directory.running() == ["vm1"]


async def test_a_killed_machine_leaves_its_name_free(tmp_path: Path, machines: list[Machine]) -> None:
    """Its directory and sockets are still there, but nobody answers."""
    left = directory.machines_directory() / "web"
    left.mkdir()
    (left / directory.CONTROL).touch()
    machine = flat(tmp_path, COUNT, name="web")
    machines.append(machine)
    assert directory.running() == []
    os.unlink(left / directory.CONTROL)  # a plain file is somebody's; a dead socket would be replaced
    await machine.start()
    assert directory.running() == ["web"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kernel": "/nonexistent"}, "/nonexistent"),
        ({"initrd": "/nonexistent"}, "/nonexistent"),
        ({"disks": ["/nonexistent"]}, "--disk /nonexistent"),
        ({"devices": ["/nonexistent.py:X"]}, "--device /nonexistent.py:X"),
        ({"memory": f"{1 << 30}K"}, "more than this host's"),
        ({"console": "socket:/nonexistent/x"}, "/nonexistent"),
        ({"console": "file:/nonexistent/x"}, "/nonexistent"),
        ({"vsock": "/nonexistent/x"}, "/nonexistent"),
        ({"shares": ["/nonexistent"]}, "--share /nonexistent"),
        ({"nics": ["switch:a"]}, "no switch answers"),
        ({"nics": ["tap:tap0,path=emulated"], "transport": "mmio"}, "transport=pci"),
    ],
)
async def test_what_cannot_be_had(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    machine = flat(tmp_path, COUNT, **fields)
    with pytest.raises(MachineError) as error:
        await machine.start()
    assert said in str(error.value)
    await machine.close()
    assert directory.running() == []


async def test_a_snapshot_goes_on(tmp_path: Path, machines: list[Machine]) -> None:
    """The counting guest: what is restored goes on with the digit after the last one."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    machine = flat(tmp_path, COUNT, name="one", disks=[str(disk)])
    machines.append(machine)
    await machine.start()
    await machine.console.expect("45", PATIENCE)
    await machine.pause()
    await asyncio.sleep(0.1)
    last = machine.console.text[-1]
    await machine.snapshot(tmp_path / "kept")
    assert machine.state == "paused"
    await machine.stop()
    restored = Machine.restored(tmp_path / "kept", name="two")
    machines.append(restored)
    await restored.start()
    following = "0" if last == "9" else chr(ord(last) + 1)
    assert (await restored.console.expect("9", PATIENCE))[0] == following
    assert restored.name == "two"


async def test_a_snapshot_of_a_running_machine_leaves_it_running(tmp_path: Path, machines: list[Machine]) -> None:
    machine = flat(tmp_path, COUNT)
    machines.append(machine)
    await machine.start()
    await machine.snapshot(tmp_path / "kept")
    assert machine.state == "running"
    await machine.console.expect("0123456789", PATIENCE)
    with pytest.raises(MachineError, match="there is something in it"):
        await machine.snapshot(tmp_path / "kept")
    # Memory that was never touched takes no room: the guest has 4 MiB, and uses a page or two.
    assert os.stat(tmp_path / "kept" / "memory").st_blocks * 512 < 1 << 20


async def test_a_power_cut_leaves_a_whole_snapshot_or_none(
    tmp_path: Path, machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is seen under its last name was on the disk before it got that name, and so was the directory. What an
    earlier cut has left is in nobody's way."""
    kept = tmp_path / "kept"
    kept.mkdir()
    for left in ("memory", "memory.new", "machine.json.new"):
        (kept / left).write_bytes(b"cut")
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(fd: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    machine = flat(tmp_path, COUNT)
    machines.append(machine)
    await machine.start()
    await machine.snapshot(kept)
    assert done == [
        *("memory.new", "machine.json.new", tmp_path.name, "kept"),
        *("memory.new -> memory", "kept", "machine.json.new -> machine.json", "kept"),
    ]
    await machine.stop()
    restored = Machine.restored(kept)
    machines.append(restored)
    await restored.start()
    await restored.console.expect("0123456789", PATIENCE)


async def test_a_snapshot_that_fails_leaves_nothing(
    tmp_path: Path, machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here at the last step but one; the machine goes on."""
    machine = flat(tmp_path, COUNT)
    machines.append(machine)
    await machine.start()

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", full)
        with pytest.raises(MachineError, match="No space left"):
            await machine.snapshot(tmp_path / "kept")
    assert os.listdir(tmp_path / "kept") == []
    assert machine.state == "running"
    (tmp_path / "kept" / "memory").touch()
    with pytest.raises(MachineError, match="there is something in it"):
        await machine.snapshot(tmp_path / "kept")


@pytest.mark.parametrize(("kind", "reason", "code"), [(1, "shutdown", 0), (3, "failed", 1), (77, "failed", 1)])
async def test_what_a_guest_tells_its_hypervisor(
    tmp_path: Path, machines: list[Machine], kind: int, reason: str, code: int
) -> None:
    """KVM_EXIT_SYSTEM_EVENT comes with a paused machine, which then has to end."""
    machine = flat(tmp_path, COUNT)
    machines.append(machine)
    await machine.start()
    assert machine._board is not None
    machine._board.vm.request_pause()
    machine._board._event("system-event", {"vcpu": 0, "type": kind, "data": []})
    end = await end_of(machine)
    assert (end.reason, end.code, machine.state) == (reason, code, "stopped")


async def test_a_reset_that_a_guest_asks_its_hypervisor_for(tmp_path: Path, machines: list[Machine]) -> None:
    machine = flat(tmp_path, COUNT)
    machines.append(machine)
    await machine.start()
    assert machine._board is not None
    machine._board.vm.request_pause()
    machine._board._event("system-event", {"vcpu": 0, "type": 2, "data": []})
    await until(lambda: any(event.kind == "reset" for event in machine.events), "it is reset")
    await machine.console.expect("0123456789", PATIENCE)


async def test_snapshots_that_cannot_be_restored(tmp_path: Path, machines: list[Machine]) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    machine = flat(tmp_path, COUNT, disks=[str(disk)])
    machines.append(machine)
    await machine.start()
    kept = tmp_path / "kept"
    await machine.snapshot(kept)
    await machine.stop()
    with pytest.raises(MachineError, match="is no snapshot"):
        Machine.restored(tmp_path)
    disk.write_bytes(b"x" * (1 << 20))
    with pytest.raises(MachineError, match="was written to since the snapshot"):
        Machine.restored(kept)
    description = (kept / "machine.json").read_bytes()
    (kept / "machine.json").write_bytes(b'{"version":1,"name":"what was in it then"}')
    with pytest.raises(MachineError, match="is of version 1, and this is for 2"):
        Machine.restored(kept, any_disks=True)
    for damaged in (b"", description[:100], b'{"version":2}', b"[]"):
        (kept / "machine.json").write_bytes(damaged)
        with pytest.raises(MachineError):
            Machine.restored(kept, any_disks=True)
    (kept / "machine.json").write_bytes(description)
    os.truncate(kept / "memory", 1 << 20)
    short = Machine.restored(kept, any_disks=True)
    with pytest.raises(MachineError, match="the snapshot is damaged"):
        await short.start()
    await short.close()


class Debugger:
    """What gdb says to a stub (gdb, "Remote Serial Protocol")."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def attached(cls, machine: Machine) -> Debugger:
        debugger = cls(*await asyncio.open_connection("127.0.0.1", machine.gdb_port))
        assert await debugger.ask("?")
        return debugger

    async def ask(self, packet: str) -> str:
        """The answer to a packet; of one that lets the guest go on, why it has stopped."""
        self.say(packet)
        async with asyncio.timeout(PATIENCE):
            await self._reader.readuntil(b"$")
            answer = await self._reader.readuntil(b"#")
            await self._reader.readexactly(2)
        self._writer.write(b"+")
        return answer[:-1].decode()

    def say(self, packet: str) -> None:
        self._writer.write(f"${packet}#{sum(packet.encode()) & 0xFF:02x}".encode())

    def interrupt(self) -> None:
        self._writer.write(b"\x03")

    def close(self) -> None:
        self._writer.close()


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(100 * PATIENCE):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"after {PATIENCE} s not yet: {what}")


def stands_still(machine: Machine) -> bool:
    assert machine._board is not None
    return machine._board.vm.paused


async def test_gdb_is_waited_for(tmp_path: Path, machines: list[Machine]) -> None:
    """The guest begins when the debugger says so, and goes on when it leaves."""
    machine = flat(tmp_path, COUNT, gdb=0)
    machines.append(machine)
    await machine.start()
    await until(lambda: stands_still(machine), "the vCPUs are there")
    assert "until it attaches" in machine.status().gdb
    gdb = await Debugger.attached(machine)
    assert "stands still for it" in machine.status().gdb
    assert machine.console.end == 0
    assert await gdb.ask("D") == "OK"
    await machine.console.expect("0123456789", PATIENCE)
    gdb.close()
    assert machine.status().gdb.endswith("not attached")


async def test_gdb_and_the_owner_pause_for_themselves(tmp_path: Path, machines: list[Machine]) -> None:
    """The guest runs when neither wants it to stand still."""
    machine = flat(tmp_path, COUNT, gdb=0)
    machines.append(machine)
    await machine.start()
    gdb = await Debugger.attached(machine)
    await machine.pause()
    await machine.resume()
    assert stands_still(machine), "gdb looks at it"
    await machine.pause()
    gdb.say("c")
    await until(lambda: machine.status().gdb.endswith("the guest runs"), "gdb has let it go on")
    assert stands_still(machine), "its owner has paused it"
    assert machine.console.end == 0
    await machine.resume()
    await machine.console.expect("0123456789", PATIENCE)
    await machine.pause()
    gdb.interrupt()
    await until(lambda: "stands still for it" in machine.status().gdb, "gdb has interrupted it")
    gdb.close()
    await until(lambda: machine.status().gdb.endswith("not attached"), "gdb has gone")
    assert stands_still(machine)
    before = machine.console.end
    await machine.resume()
    await until(lambda: machine.console.end > before + 10, "it goes on")


async def test_no_snapshot_while_gdb_is_attached(tmp_path: Path, machines: list[Machine]) -> None:
    machine = flat(tmp_path, COUNT, gdb=0)
    machines.append(machine)
    await machine.start()
    gdb = await Debugger.attached(machine)
    with pytest.raises(MachineError, match=r"gdb is attached to vm1, and its breakpoints .* detach"):
        await machine.snapshot(tmp_path / "kept")
    assert await gdb.ask("D") == "OK"
    gdb.close()
    await until(lambda: machine.status().gdb.endswith("not attached"), "gdb has gone")
    await machine.snapshot(tmp_path / "kept")
    restored = Machine.restored(tmp_path / "kept", name="two")
    machines.append(restored)
    await restored.start()
    await restored.console.expect("0123456789", PATIENCE)


async def test_the_end_of_a_guest_is_shown_to_gdb_first(tmp_path: Path, machines: list[Machine]) -> None:
    """There is nothing to execute: signal 11 or 4, by what the engine makes of it. When gdb goes on it ends."""
    machine = flat(tmp_path, NOWHERE, gdb=0, memory="512K")
    machines.append(machine)
    await machine.start()
    gdb = await Debugger.attached(machine)
    assert (await gdb.ask("c")).startswith(("T0b", "T04"))
    assert "stands still for it" in machine.status().gdb
    assert machine.state == "running"
    assert not any(event.kind in ("triple-fault", "ended") for event in machine.events)
    gdb.say("c")
    assert (await end_of(machine)).reason in ("triple-fault", "failed")
    gdb.close()
