"""The control socket: what it answers, what it refuses, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from viaduct.switch.config import NullPort, SwitchConfig
from viaduct.switch.control import ControlServer
from viaduct.switch.control_client import ControlClient
from viaduct.switch.control_wire import LINE_MAX, ControlError, connecting_path, listening_path
from viaduct.switch.pcapng import PcapngEncoder
from viaduct.switch.status import Event, Frame
from viaduct.vhost_user.errors import SocketPathError

from .scripted_switch import ScriptedSwitch

T = TypeVar("T")


class Running:
    """A scripted switch behind a control socket."""

    def __init__(self, path: Path) -> None:
        self.switch = ScriptedSwitch(SwitchConfig(ports={"vm1": NullPort()}))
        self.ended = asyncio.Event()
        self.path = path
        self.server = ControlServer(self.switch, path, self.ended.set)

    async def ask(self, work: Callable[[ControlClient], T]) -> T:
        """Use a client, which blocks, in a thread of its own."""

        def use() -> T:
            with ControlClient(self.path) as client:
                return work(client)

        return await asyncio.to_thread(use)

    async def refusal(self, method: str, **params: Any) -> ControlError:
        with pytest.raises(ControlError) as refused:
            await self.ask(lambda client: client.call(method, **params))
        return refused.value

    async def raw(self, data: bytes) -> Any:
        """The answer to bytes of any kind."""
        reader, writer = await asyncio.open_unix_connection(self.path, limit=2 * LINE_MAX)
        writer.write(data)
        answer = await reader.readline()
        writer.close()
        return json.loads(answer)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    made = Running(tmp_path / "control.sock")
    async with made.server:
        yield made


async def test_ports_are_listed_added_and_removed(running: Running) -> None:
    def work(client: ControlClient) -> list[str]:
        client.call("port.add", name="vm2", port={"kind": "vhost-user", "path": "/run/vm2.sock"})
        client.call("port.del", name="vm1")
        return [port["config"] for port in client.call("port.list")]

    assert await running.ask(work) == ["vhost-user:/run/vm2.sock"]


async def test_a_port_is_changed(running: Running) -> None:
    def work(client: ControlClient) -> list[str]:
        client.call("port.set", name="vm1", options=["rate=2.5M", "private"])
        return [port["config"] for port in client.call("port.list")]

    before = await running.ask(lambda client: [port["config"] for port in client.call("port.list")])
    assert await running.ask(work) == [f"{before[0]},rate=2500k,private"]
    refused = await running.refusal("port.set", name="vm1", options=["rat=1G"])
    assert "did you mean 'rate'?" in str(refused)
    refused = await running.refusal("port.set", name="vm2", options=["rate=1G"])
    assert "did you mean 'vm1'?" in str(refused)
    refused = await running.refusal("port.set", name="vm1", options="rate=1G")
    assert refused.code == "request"


async def test_a_whole_configuration_is_applied_and_shown(running: Running) -> None:
    config = {"ports": {"a": {"kind": "null"}, "b": "tap:tap0"}, "polling": "busy"}
    await running.ask(lambda client: client.call("apply", config=config))
    shown = await running.ask(lambda client: client.call("config"))
    assert shown["polling"] == "busy"
    assert shown["ports"] == {"a": {"kind": "null"}, "b": {"kind": "tap", "ifname": "tap0"}}


async def test_what_is_impossible_is_refused_with_the_reason(running: Running) -> None:
    refused = await running.refusal("port.add", name="vm1", port={"kind": "null"})
    assert refused.code == "config"
    assert "a port of that name exists already" in str(refused)
    refused = await running.refusal("port.add", name="a", port={"kind": "nul"})
    assert "did you mean 'null'?" in str(refused)
    refused = await running.refusal("port.del", name="vm11")
    assert "did you mean 'vm1'?" in str(refused)


async def test_wrong_requests_are_refused_and_the_connection_goes_on(running: Running) -> None:
    refused = await running.refusal("port.lst")
    assert refused.code == "method"
    assert "port.list" in str(refused)
    refused = await running.refusal("port.add", nme="a")
    assert refused.code == "request"
    assert "unknown: nme; known: name, port" in str(refused)

    def twice(client: ControlClient) -> int:
        with pytest.raises(ControlError):
            client.call("nothing")
        return len(client.call("macs"))

    assert await running.ask(twice) == 1


@pytest.mark.parametrize(
    "data", [b"hello\n", b"[]\n", b'{"id": "x", "method": "macs"}\n', b'{"method": "macs", "extra": 1}\n', b"\xff\n"]
)
async def test_what_is_no_request_is_refused(running: Running, data: bytes) -> None:
    answer = await running.raw(data)
    assert answer["error"]["code"] == "request"


async def test_a_line_without_end_is_refused(running: Running) -> None:
    answer = await running.raw(b"x" * (LINE_MAX + 1))
    assert str(LINE_MAX) in answer["error"]["message"]


async def test_events_stream_until_the_client_leaves(running: Running) -> None:
    for number in range(3):
        running.switch.happenings.put_nowait(Event(time=number, kind="link-up", message="up", port="vm1"))

    def work(client: ControlClient) -> list[Any]:
        stream = client.stream("events")
        return [next(stream)["time"] for _ in range(3)]

    assert await running.ask(work) == [0, 1, 2]
    assert await running.ask(lambda client: client.call("macs"))


async def test_statistics_are_watched(running: Running) -> None:
    def work(client: ControlClient) -> list[float]:
        stream = client.stream("stats.watch", interval=0.01)
        return [next(stream)["time"] for _ in range(3)]

    assert await running.ask(work) == [1, 2, 3]

    def refused(client: ControlClient) -> None:
        next(client.stream("stats.watch", interval=0))

    with pytest.raises(ControlError, match=r"interval 0 is outside 0\.01 to 3600"):
        await running.ask(refused)


def frames(count: int) -> list[Frame]:
    return [
        Frame(1_700_000_000_123_456_789 + n, "vm1", "received" if n % 2 else "sent", 60 + n, bytes(60 + n))
        for n in range(count)
    ]


async def test_a_capture_ends_after_the_frames_asked_for(running: Running) -> None:
    running.switch.frames.put_nowait(frames(3))
    running.switch.frames.put_nowait(frames(5))
    data = await running.ask(lambda client: b"".join(client.bytes("capture", port="vm1", count=6)))
    encoder = PcapngEncoder()
    assert data == encoder.header() + b"".join(map(encoder.frame, [*frames(3), *frames(5)[:3]]))
    assert running.switch.captures_open == 0


async def test_a_capture_ends_when_the_client_leaves(running: Running) -> None:
    running.switch.frames.put_nowait(frames(1))
    await running.ask(lambda client: next(client.bytes("capture", port="vm1")))
    for _ in range(100):
        if running.switch.captures_open == 0:
            break
        await asyncio.sleep(0.01)
    assert running.switch.captures_open == 0


async def test_a_capture_of_no_port_is_refused(running: Running) -> None:
    with pytest.raises(ControlError, match="did you mean 'vm1'"):
        await running.ask(lambda client: next(client.bytes("capture", port="vm")))
    with pytest.raises(ControlError, match="count 0 is no positive number"):
        await running.ask(lambda client: next(client.bytes("capture", port="vm1", count=0)))


async def test_shutdown_ends_the_switch(running: Running) -> None:
    await running.ask(lambda client: client.call("shutdown"))
    await asyncio.wait_for(running.ended.wait(), 5)


async def test_only_this_user_may_connect(running: Running) -> None:
    assert stat.S_IMODE(running.path.stat().st_mode) == 0o600


async def test_the_socket_goes_with_the_switch(tmp_path: Path) -> None:
    made = Running(tmp_path / "control.sock")
    async with made.server:
        assert made.path.is_socket()
    assert not made.path.exists()


async def test_a_live_socket_is_not_taken_but_a_stale_one_is(running: Running, tmp_path: Path) -> None:
    with pytest.raises(SocketPathError, match="is in use"):
        await Running(running.path).server.start()
    assert await running.ask(lambda client: client.call("macs"))

    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    second = Running(stale)
    async with second.server:
        assert (await second.raw(b'{"method": "macs"}\n'))["result"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("missing/control.sock", "directory"), ("file", "no socket"), ("x" * 120, "107")],
)
async def test_impossible_places_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SocketPathError, match=problem):
        await Running(tmp_path / name).server.start()
    assert (tmp_path / "file").read_text() == "mine"


async def test_nothing_is_left_open(running: Running) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def use() -> None:
        await running.ask(lambda client: client.call("port.list"))
        await running.raw(b"nonsense\n")
        running.switch.frames.put_nowait(frames(1))
        await running.ask(lambda client: next(client.bytes("capture", port="vm1")))

    await use()
    before = descriptors()
    for _ in range(20):
        await use()
    for _ in range(100):
        if descriptors() <= before:
            break
        await asyncio.sleep(0.01)
    assert descriptors() <= before


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="it does not exist") as refused:
        ControlClient(tmp_path / "nobody.sock")
    assert refused.value.code == "unreachable"
    assert "viaduct switch" in str(refused.value)


def test_where_the_socket_is_when_nobody_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("VIADUCT_CONTROL", raising=False)
    assert connecting_path() == tmp_path / "viaduct" / "control.sock" or connecting_path().exists()
    assert listening_path() == tmp_path / "viaduct" / "control.sock"
    assert stat.S_IMODE((tmp_path / "viaduct").stat().st_mode) == 0o700
    monkeypatch.setenv("VIADUCT_CONTROL", "/somewhere/else.sock")
    assert connecting_path() == listening_path() == Path("/somewhere/else.sock")


def test_a_directory_that_others_may_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("VIADUCT_CONTROL", raising=False)
    (tmp_path / "viaduct").mkdir()
    (tmp_path / "viaduct").chmod(0o777)
    assert listening_path().parent != tmp_path / "viaduct"
