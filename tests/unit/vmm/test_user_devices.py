"""Devices of the user's own by `--device`: registers on a bus, what is wrong with a class, and what it gets wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import string
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from viaduct import Machine
from viaduct.switch.config_error import ConfigError
from viaduct.vmm.config import DeviceConfig, build_machine, parse_part
from viaduct.vmm.errors import MachineError

PATIENCE = 60
DICE = Path(__file__).parents[3] / "examples" / "dice.py"
OWN = """
class Letters:
    \"\"\"Counts letters, round and round: each read gives the next one after what was written last, and a small
    one after it was restored.\"\"\"
    pio = (0x700, 4)
    def __init__(self, first="A"):
        self.last = ord(first) - 1
        self.case = 0
    def read(self, offset, size):
        self.last = ord("A") + (self.last + 1 - ord("A")) % 26
        return self.last | self.case
    def write(self, offset, data):
        self.last = data[0]
    def save(self):
        return {"last": self.last}
    def restore(self, data):
        self.last = data["last"]
        self.case = 0x20

class Memory:
    mmio = (0xF0000000, 0x1000)
    irq = 7
    def plugged(self, place):
        self.place = place
        place.set_irq(True)
        place.set_irq(False)
        place.memory.write(0x8000, b"!")
    def read(self, offset, size):
        return self.place.memory.read(0x8000, 1) * size
    def write(self, offset, data): ...

class Broken(Letters):
    def read(self, offset, size):
        raise LookupError("nothing there")

class ReadOnly:
    def read(self, offset, size): ...

class Narrow(Letters):
    def read(self, offset): ...

class Async(Letters):
    async def read(self, offset, size): ...

class Nowhere:
    def read(self, offset, size): ...
    def write(self, offset, data): ...

class Odd(Nowhere):
    pio = "the third from the left"

class BadPlug(Letters):
    def plugged(self, place):
        raise LookupError("no plug")

class Forgetful(Nowhere):
    pio = (0x700, 4)

class Unspeakable(Letters):
    def save(self):
        return {"me": self}

class Pixels(Letters):
    def save(self):
        return {"pixels": b"black"}

class Leaves(Letters):
    def __init__(self):
        raise SystemExit("enough")

class Nothing:
    pass

class Closes(Letters):
    def close(self):
        with open("closed", "a") as file:
            file.write("x")
"""


def show(port: int) -> bytes:
    """mov dx, port; in al, dx; mov dx, 0x3f8; out dx, al."""
    return b"\xba" + port.to_bytes(2, "little") + b"\xec\xba\xf8\x03\xee"


SLOWLY = bytes.fromhex("b9 40 9c 49 75 fd")
"""mov cx, 40000; 1: dec cx; jnz 1b."""


def again(code: bytes) -> bytes:
    """Followed by a jump to its beginning."""
    code += SLOWLY
    return code + b"\xeb" + (-len(code) - 2).to_bytes(1, "little", signed=True)


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of their own for these machines' sockets, and one with devices to work in."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_registers.py").write_text(OWN)


@pytest.fixture
async def machines() -> AsyncIterator[list[Machine]]:
    """Closes what a test puts in."""
    made: list[Machine] = []
    yield made
    for machine in made:
        await machine.close()


def machine_of(machines: list[Machine], code: bytes, *devices: str, **fields: Any) -> Machine:
    Path("kernel.bin").write_bytes(code)
    machine = Machine(kernel="kernel.bin", boot="flat", memory="4M", devices=list(devices), **fields)
    machines.append(machine)
    return machine


async def test_registers_at_ports(machines: list[Machine]) -> None:
    machine = machine_of(machines, again(show(0x702)), "own_registers.py:Letters")
    await machine.start()
    await machine.console.expect("ABCDEFG", PATIENCE)
    assert "letters0: ports 0x700 to 0x703" in machine.status().devices
    assert any(row.device == "letters0" and row.address == 0x702 for row in machine.exits().rows())


async def test_the_configuration_says_where_and_how(machines: list[Machine]) -> None:
    """Over what the class says; and a reset makes a new object."""
    machine = machine_of(machines, again(show(0x900)), "own_registers.py:Letters,pio=0x900+1,irq=7,first=M")
    await machine.start()
    await machine.console.expect("MNOP", PATIENCE)
    assert "letters0: ports 0x900 to 0x900, interrupt 7" in machine.status().devices
    await machine.reset()
    await machine.console.expect("MNOP", PATIENCE)


async def test_registers_at_addresses_with_memory_and_a_line(machines: list[Machine]) -> None:
    """Real mode reaches no address above 1 MiB, so the memory below is what there is to see."""
    code = bytes.fromhex("31 db 8e db a0 00 80 ba f8 03 ee")  # xor bx, bx; mov ds, bx; mov al, [0x8000]; ... out dx, al
    machine = machine_of(machines, again(code), "own_registers.py:Memory")
    await machine.start()
    await machine.console.expect("!!!", PATIENCE)
    assert "memory0: addresses 0xf0000000 to 0xf0000fff, interrupt 7" in machine.status().devices


async def test_the_example(machines: list[Machine]) -> None:
    machine = machine_of(machines, again(show(0x701)), f"{DICE}:Dice,pio=0x700+4,faces=65")
    await machine.start()
    await machine.console.expect("AAA", PATIENCE)


async def test_a_device_that_raises_reads_as_ones_and_is_told_of_seldom(
    machines: list[Machine], caplog: pytest.LogCaptureFixture
) -> None:
    """The guest repeats it as fast as it can; after some hundred times there is a handful of lines, which name it."""
    # in al, dx; cmp al, 0xff; jne (ends); 'x' to the console.
    code = bytes.fromhex("ba 00 07 ec 3c ff 75 fe b0 78 ba f8 03 ee")
    machine = machine_of(
        machines, code + b"\xeb" + (-len(code) - 2).to_bytes(1, "little", signed=True), "own_registers.py:Broken"
    )
    with caplog.at_level(logging.WARNING):
        await machine.start()
        await machine.console.expect("x" * 500, PATIENCE)
        await machine.pause()
    failures = [record.getMessage() for record in caplog.records if "nothing there" in record.getMessage()]
    assert 0 < len(failures) < 40
    assert all("broken0" in text for text in failures)
    assert any(event.kind == "device-error" and "broken0" in event.text for event in machine.events)


async def test_what_a_device_remembers_is_in_a_snapshot(machines: list[Machine]) -> None:
    machine = machine_of(machines, again(show(0x700)), "own_registers.py:Letters")
    await machine.start()
    await machine.console.expect("EF", PATIENCE)
    await machine.snapshot("kept")
    await machine.stop()
    restored = Machine.restored("kept")
    machines.append(restored)
    await restored.start()
    description = await asyncio.to_thread(Path("kept", "machine.json").read_text)
    last = json.loads(description)["registers"]["letters0"]["last"]
    following = string.ascii_lowercase[(last + 1 - ord("A")) % 26]
    seen = await restored.console.expect(following, PATIENCE)
    assert [letter for letter in seen if letter.islower()] == [following], "after what it remembers"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Forgetful", "no save() and restore(data)"),
        ("Unspeakable", "no plain data"),
        ("Pixels", "gives back as something else"),
    ],
)
async def test_what_cannot_be_remembered(machines: list[Machine], name: str, said: str) -> None:
    """The machine goes on, and nothing is left of the snapshot."""
    machine = machine_of(machines, again(b"\xb0\x78\xba\xf8\x03\xee"), f"own_registers.py:{name}")
    await machine.start()
    with pytest.raises(MachineError) as error:
        await machine.snapshot("kept")
    assert said in str(error.value)
    assert name in str(error.value)
    await machine.console.expect("xxx", PATIENCE)
    assert machine.state == "running"


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("ReadOnly", "it has no write"),
        ("Nothing", "it has no read and no write; its devices are Letters"),
        ("Narrow", "cannot be called as read(offset, size)"),
        ("Async", "async"),
        ("Nowhere", "is nowhere yet: say pio=BASE+SIZE"),
        ("Nowhere,pio=0x700+4,mmio=0xf0000000+4", "in two places"),
        ("Odd", "is no range"),
        ("Nowhere,pio=0x700+0", "is no range"),
        ("Nowhere,pio=0x10000+2", "not inside the bus"),
        ("Nowhere,pio=0x3f0+16", "overlaps serial at 0x3f8-0x3ff"),
        ("Nowhere,pio=0x20+2", "the interrupt controller is at 0x20 to 0x21"),
        ("Nowhere,pio=0xc000+4", "the PCI bus's window is at 0xc000 to 0xffff"),
        ("Nowhere,mmio=0x1000+0x1000", "memory is at 0x0 to 0x3fffff; free are for example 0xf0000000"),
        ("Nowhere,mmio=0xfee00000+0x1000", "the interrupt controller is at"),
        ("Nowhere,mmio=0xe0000000+0x1000", "0xe0000000-0xefffffff"),
        ("Nowhere,mmio=0xffffffffffffffff+2", "not inside the bus"),
        ("Letters,irq=4", "irq=4 is that of the serial port (free: 3, 7, 12"),
        ("Letters,irq=5", "that of the PCI bus"),
        ("Letters,irq=6", "that of the power button"),
        ("Letters,irq=24", "there is none: 0 to 23"),
        ("Letters,last=Z", "could not be made: TypeError"),
        ("BadPlug", "its plugged failed: LookupError: no plug"),
        ("Leaves", "could not be made: SystemExit: enough"),
    ],
)
async def test_what_cannot_be_placed(machines: list[Machine], device: str, said: str) -> None:
    """In a sentence that names the device."""
    machine = machine_of(machines, b"\xf4", f"own_registers.py:{device}")
    with pytest.raises(MachineError) as error:
        await machine.start()
    assert said in str(error.value)
    assert f"own_registers.py:{device.partition(',')[0]}" in str(error.value)
    assert str(error.value).startswith("--device ")


async def test_two_devices_want_the_same(machines: list[Machine]) -> None:
    for first, second, said in (
        ("pio=0x700+4", "pio=0x703+1", "overlaps nowhere0 at 0x700-0x703"),
        ("pio=0x700+4,irq=7", "pio=0x800+4,irq=7", "irq=7 is that of nowhere0"),
    ):
        machine = machine_of(
            machines, b"\xf4", f"own_registers.py:Nowhere,{first}", f"own_registers.py:Nowhere,{second}"
        )
        with pytest.raises(MachineError) as error:
            await machine.start()
        assert said in str(error.value)


async def test_a_virtio_device_is_not_placed(machines: list[Machine]) -> None:
    machine = machine_of(machines, b"\xf4", f"{DICE.parent / 'rng.py'}:Rng,pio=0x700+4")
    with pytest.raises(MachineError, match="virtio device: its driver finds it by itself"):
        await machine.start()


async def test_devices_go_with_their_machine(machines: list[Machine]) -> None:
    """`close` is called once for each time the machine is switched on."""
    machine = machine_of(machines, b"\xf4", "own_registers.py:Closes")
    await machine.start()
    await machine.reset()
    assert await asyncio.to_thread(Path("closed").read_text) == "x"
    await machine.stop()
    assert await asyncio.to_thread(Path("closed").read_text) == "xx"


def test_short_forms(tmp_path: Path) -> None:
    assert parse_part(DeviceConfig, "a.py:B,pio=0x10+4,irq=6,x=1") == DeviceConfig(
        name="a.py:B", pio="0x10+4", irq=6, options={"x": "1"}
    )
    config = build_machine(
        {"kernel": "k", "devices": ["a.py:B", {"name": "c.d:E", "mmio": "0xF0000000+0x1000"}]}, tmp_path
    )
    assert [device.name for device in config.devices] == [f"{tmp_path}/a.py:B", "c.d:E"]
    for wrong, said in (
        ("a.py:B,pio=16", "pio: '16' is no range"),
        ("a.py:B,mmio=-1+5", "mmio: '-1+5' is no range"),
        ("a.py:B,irq=x", "irq: expected `int"),
        ("a.py:B,pio", "needs a value"),
        ("a.py:B,x=1,x=2", "x: stands twice"),
        ("a.py:B,x", "unknown option 'x'"),
    ):
        with pytest.raises(ConfigError) as error:
            build_machine({"kernel": "k", "devices": [wrong]})
        assert said in str(error.value)


async def test_a_device_is_closed_that_never_got_a_place(machines: list[Machine]) -> None:
    """Because another one was refused."""
    machine = machine_of(machines, b"\xf4", "own_registers.py:Closes", "own_registers.py:Nowhere")
    with pytest.raises(MachineError, match="is nowhere yet"):
        await machine.start()
    assert await asyncio.to_thread(Path("closed").read_text) == "x"
