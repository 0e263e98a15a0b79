"""The console, from the driver's side."""

from __future__ import annotations

import json
import struct

import pytest

from devices.slot import Ring, Slot, until
from viaduct.devices.console import PORTS_MAX, Console, ConsolePort, Event, receive_queue
from viaduct.devices.console_terminal import INPUT_MAX, ConsoleTerminal
from viaduct.vhost_user.handover import Fds
from viaduct.virtio import ConsoleFeature, DeviceFeature

SOON = 30.0
CONTROL = struct.Struct("<IHH")


def message(port: int, event: Event, value: int = 0) -> bytes:
    return CONTROL.pack(port, event, value)


async def answers(ring: Ring, count: int) -> list[tuple[int, Event, int, bytes]]:
    """So many control messages from the device."""
    found = []
    for _ in range(count):
        _, data = await ring.next_used()
        ring.add(room=64)
        port, event, value = CONTROL.unpack_from(data)
        found.append((port, Event(event), value, data[CONTROL.size :]))
    return found


@pytest.mark.parametrize("packed", [0, DeviceFeature.RING_PACKED], ids=["split", "packed"])
async def test_both_directions(packed: int) -> None:
    terminal = ConsoleTerminal()
    async with Slot(Console(terminal), DeviceFeature.VERSION_1 | packed) as slot:
        receive, transmit = slot.rings
        for number in range(100):
            await transmit.ask(out=[b"host login", b": ", b"%d\n" % number])
            await terminal.expect(f"login: {number}\n", SOON)
            receive.add(room=100)
            terminal.write(f"root {number}\n")
            assert (await receive.next_used())[1] == f"root {number}\n".encode()


async def test_what_was_typed_before_the_guest_had_room() -> None:
    terminal = ConsoleTerminal()
    terminal.write("typed early, ")
    async with Slot(Console(terminal)) as slot:
        terminal.write("and more")
        for room in (5, 1, [3, 4], 100):
            slot.rings[0].add(room=room)
        got = b"".join([(await slot.rings[0].next_used())[1] for _ in range(4)])
        assert got == b"typed early, and more"
        assert not terminal.input_waiting


async def test_a_guest_that_does_not_read_keeps_writing() -> None:
    terminal = ConsoleTerminal(scroll_back=4096)
    async with Slot(Console(terminal)) as slot:
        terminal.write(bytes(INPUT_MAX))
        for _ in range(100):
            await slot.rings[1].ask(out=b"x" * 4096)
        assert terminal.end == 100 * 4096
        with pytest.raises(BufferError):
            terminal.write("one more")


async def test_buffers_without_room_or_data() -> None:
    terminal = ConsoleTerminal()
    async with Slot(Console(terminal)) as slot:
        assert await slot.rings[1].ask(room=16) == b""
        terminal.write("a")
        assert await slot.rings[0].ask(out=b"nothing to write into") == b""
        assert await slot.rings[0].ask(room=4) == b"a"
        assert not slot.failures


async def test_sizes_of_a_single_port() -> None:
    terminal = ConsoleTerminal()
    device = Console(terminal)
    assert device.features & ConsoleFeature.SIZE
    assert not device.features & ConsoleFeature.MULTIPORT
    async with Slot(device) as slot:
        terminal.resize(80, 25)
        assert device.read_config(0, 12) == struct.pack("<HHII", 80, 25, 1, 0)
        assert device.read_config(2, 2) == b"\x19\0"
        assert device.read_config(8, 16) == bytes(16)
        assert slot.config_changes == 1


async def test_emergency_writes_need_no_queue() -> None:
    terminal = ConsoleTerminal()
    device = Console(terminal)
    for character in b"panic":
        device.write_config(8, struct.pack("<I", character), 0)
    device.write_config(0, struct.pack("<HHII", 80, 25, 1, ord("!")), 0)  # As QEMU passes it on.
    assert terminal.text == "panic!"
    for offset, data in ((0, b"\0\0"), (4, bytes(4)), (12, b"x"), (9, b"x")):
        with pytest.raises(ValueError, match="not the driver's to write"):
            device.write_config(offset, data, 0)


def several() -> tuple[Console, list[ConsoleTerminal]]:
    terminals = [ConsoleTerminal() for _ in range(3)]
    ports = [
        ConsolePort(terminals[0]),
        ConsolePort(terminals[1], name="org.viaduct.agent", console=False),
        ConsolePort(terminals[2]),
    ]
    return Console(*ports), terminals


async def test_the_driver_learns_about_ports() -> None:
    device, terminals = several()
    assert device.queue_count == 8
    terminals[2].resize(132, 43)
    async with Slot(device) as slot:
        control, tell = slot.rings[2], slot.rings[3]
        for _ in range(8):
            control.add(room=64)
        await tell.ask(out=message(0xFFFFFFFF, Event.DEVICE_READY, 1))
        assert await answers(control, 3) == [(n, Event.DEVICE_ADD, 0, b"") for n in range(3)]
        for number in range(3):
            await tell.ask(out=message(number, Event.PORT_READY, 1))
        assert await answers(control, 7) == [
            (0, Event.CONSOLE_PORT, 1, b""),
            (0, Event.PORT_OPEN, 1, b""),
            (1, Event.PORT_NAME, 1, b"org.viaduct.agent"),
            (1, Event.PORT_OPEN, 1, b""),
            (2, Event.CONSOLE_PORT, 1, b""),
            (2, Event.RESIZE, 0, struct.pack("<HH", 43, 132)),
            (2, Event.PORT_OPEN, 1, b""),
        ]
        terminals[0].resize(80, 25)
        assert await answers(control, 1) == [(0, Event.RESIZE, 0, struct.pack("<HH", 25, 80))]
        terminals[1].resize(80, 25)  # No console: nobody is told.
        receive = slot.rings[receive_queue(1)]
        terminals[1].write("before it is open")
        receive.add(room=64)
        await tell.ask(out=message(1, Event.PORT_OPEN, 1))
        assert (await receive.next_used())[1] == b"before it is open"
        await slot.rings[receive_queue(1) + 1].ask(out=b"an answer")
        assert await terminals[1].expect("answer", SOON) == "an answer"
        await tell.ask(out=message(1, Event.PORT_OPEN, 0))
        terminals[1].write("closed")
        receive.add(room=64)
        await tell.ask(out=b"later")
        assert not receive.used
        assert terminals[1].input_waiting == 6


async def test_control_messages_that_make_no_sense() -> None:
    device, _ = several()
    async with Slot(device) as slot:
        control, tell = slot.rings[2], slot.rings[3]
        for nonsense in (
            b"",
            b"short",
            message(99, Event.PORT_READY, 1),
            message(0xFFFFFFFF, Event.PORT_OPEN, 1),
            message(0, Event.DEVICE_ADD, 1),
            struct.pack("<IHH", 0, 77, 1),
            message(0, Event.DEVICE_READY, 0),
            message(1, Event.PORT_READY, 7),
        ):
            await tell.ask(out=nonsense, room=4)
        control.add(room=4)
        control.add(room=64)
        await tell.ask(out=message(0, Event.DEVICE_READY, 1))
        assert (await control.next_used())[1] == b""  # Too small for a message.
        assert (await control.next_used())[1] == message(1, Event.DEVICE_ADD)
        assert not slot.failures


async def test_a_driver_that_does_not_read_the_answers_is_not_listened_to() -> None:
    device, _ = several()
    async with Slot(device, queue_size=256) as slot:
        control, tell = slot.rings[2], slot.rings[3]
        for _ in range(100):
            tell.add(out=message(0, Event.DEVICE_READY, 1), kick=False)
        tell.kick()
        await until(tell.arrived)
        taken = len(tell.used)
        assert 0 < taken < 20
        await slot.rings[1].ask(out=b"another queue")  # Goes on.
        told = 0
        while len(tell.used) < 100:
            control.add(room=64)
            await control.next_used()
            told += 1
            tell.collect()
        while told < 300:
            control.add(room=64)
            await control.next_used()
            told += 1


async def test_a_driver_without_ports_gets_the_first() -> None:
    device, terminals = several()
    async with Slot(device, DeviceFeature.VERSION_1 | ConsoleFeature.SIZE, queues=2) as slot:
        await slot.rings[1].ask(out=b"hello")
        terminals[0].write("there")
        assert await slot.rings[0].ask(room=10) == b"there"
        terminals[0].resize(1, 2)
        assert slot.config_changes == 1


async def test_a_reset_forgets_which_ports_were_open() -> None:
    device, terminals = several()
    async with Slot(device) as slot:
        await slot.rings[3].ask(out=message(1, Event.PORT_OPEN, 1))
        await slot.reset()
        terminals[1].write("x")
        slot.rings[4].add(room=8)
        await slot.rings[3].ask(out=b"nothing")
        assert not slot.rings[4].used
        await slot.rings[3].ask(out=message(1, Event.PORT_OPEN, 1))
        assert (await slot.rings[4].next_used())[1] == b"x"


async def test_a_driver_that_begins_anew_has_opened_nothing() -> None:
    device, terminals = several()
    async with Slot(device) as slot:
        await slot.rings[3].ask(out=message(1, Event.PORT_OPEN, 1))
        await slot.rings[3].ask(out=message(0, Event.DEVICE_READY, 1))
        terminals[1].write("x")
        slot.rings[4].add(room=8)
        await slot.rings[3].ask(out=b"nothing")
        assert not slot.rings[4].arrived()
        await slot.rings[3].ask(out=message(1, Event.PORT_OPEN, 1))
        assert (await slot.rings[4].next_used())[1] == b"x"


async def test_what_is_saved_goes_on_elsewhere() -> None:
    before, _ = several()
    async with Slot(before) as slot:
        await slot.rings[3].ask(out=message(0, Event.DEVICE_READY, 1))
        await slot.rings[3].ask(out=message(1, Event.PORT_OPEN, 1))
        saved = json.loads(json.dumps(before.save(Fds())))  # As a snapshot keeps it.
    after, terminals = several()
    after.restore(saved, Fds())
    async with Slot(after) as slot:
        for _ in range(3):
            slot.rings[2].add(room=64)
        assert await answers(slot.rings[2], 3) == [(n, Event.DEVICE_ADD, 0, b"") for n in range(3)]
        terminals[1].write("x")
        assert await slot.rings[4].ask(room=8) == b"x"


async def test_a_pause_loses_nothing() -> None:
    terminal = ConsoleTerminal()
    async with Slot(Console(terminal)) as slot:
        slot.rings[0].add(room=3)
        slot.rings[0].add(room=64)
        terminal.write("abcdef")
        await slot.stop()
        terminal.write("ghi")
        slot.start()
        slot.rings[0].add(room=64)
        await until(lambda: not terminal.input_waiting)
        got = b""
        while len(got) < 9:
            got += (await slot.rings[0].next_used())[1]
        assert got == b"abcdefghi"


def test_how_many_ports() -> None:
    for count in (0, PORTS_MAX + 1):
        with pytest.raises(ValueError, match="1 to 31"):
            Console(*[ConsoleTerminal() for _ in range(count)])
    assert Console(*[ConsoleTerminal() for _ in range(31)]).queue_count == 64
