"""What people and other processes write: configurations, ports on the command line, control requests, hand-overs.

Right text with a few mistakes in it gets further than noise. Whatever comes, the answer is the error made for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from viaduct.switch.config import ConfigError, NullPort, SwitchConfig
from viaduct.switch.config_toml import key_lines, load_config, parse_config
from viaduct.switch.control import ControlServer
from viaduct.switch.control_wire import LINE_MAX
from viaduct.switch.handover_format import (
    FORMATS,
    PortData,
    PortPosition,
    PositionsData,
    Sources,
    Station,
    SwitchData,
    decode,
    encode,
)
from viaduct.switch.port_text import parse_named_port

from .scripted_switch import ScriptedSwitch

TOML = """
pollers = [0, 1]
polling = "adaptive"
mac_ageing = 300

[ports]
vm2 = "vhost-user:/tmp/vm2.sock,trunk=10-20+30,client"

[ports.vm1]
kind = "vhost-user"
path = "/tmp/vm1.sock"
queues = 2
vlan = 10
"""
PORTS = (
    "vm1=vhost-user:/tmp/a.sock,queues=2,mtu=9000,vlan=10,client",
    "vm2=vhost-user:/tmp/a.sock,trunk=10-20+30,mode=0660",
    "t=tap:tap0,queues=2",
    "r=pcap:in.pcap,out=/tmp/out.pcap",
    "n=null",
)
MESSAGES = (
    SwitchData(
        format=FORMATS[-1],
        version="1",
        pid=1,
        running=SwitchConfig(ports={"n": NullPort()}),
        configured=SwitchConfig(),
        sources=Sources(ports=["n=null"]),
        directory="/",
        control_path="/control",
        control=0,
        stdio=[1, 2, 3],
        ports=1,
    ),
    PortData(name="n", listener=0, taps=[1], accepted=["csum"]),
    PositionsData(
        stopped=1.5,
        ports={"n": PortPosition(rings={0: 7}, replayed=3)},
        stations=[Station("02:00:00:00:00:01", 0, "n", 1)],
    ),
)
REQUESTS = (
    {"method": "about", "id": 1, "params": {}},
    {"method": "port.add", "id": 2, "params": {"name": "vm3", "port": {"kind": "vhost-user", "path": "/run/vm3.sock"}}},
    {"method": "port.del", "id": 3, "params": {"name": "vm1"}},
    {"method": "apply", "id": 4, "params": {"config": {"ports": {}}}},
    {"method": "events.history", "id": 5, "params": {"since": 1.5}},
    {"method": "stats", "id": 6, "params": {}},
)
PIECES = st.one_of(
    st.sampled_from([b"", b'"', b"[", b"]", b"{", b"}", b"=", b",", b":", b"\n", b"\0", b"-1", b"1e999", b"9" * 400]),
    st.sampled_from([b"null", b"true", b"nan", b"[[", b"\\ud800", b"\xff\xfe", b"\xf0\x9f\xa6\x84", b"{" * 3000]),
    st.binary(max_size=8),
)


def spoilt(*right: bytes) -> st.SearchStrategy[bytes]:
    """One of the texts, with up to four pieces replaced, taken out or put in."""
    cuts = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), PIECES), max_size=4)

    def spoil(text: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
        for where, length, piece in changes:
            at = int(where * len(text))
            text = text[:at] + piece + text[at + length :]
        return text

    return st.builds(spoil, st.sampled_from(right), cuts)


@given(spoilt(TOML.encode()))
def test_configurations(data: bytes) -> None:
    text = data.decode(errors="replace")
    with contextlib.suppress(ConfigError):
        parse_config(text)
    with contextlib.suppress(ConfigError):
        key_lines(text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(data=spoilt(TOML.encode()))
def test_configuration_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "switch.toml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load_config(path)


@given(spoilt(*(port.encode() for port in PORTS)))
def test_ports_on_the_command_line(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        parse_named_port(data.decode(errors="surrogateescape"))


@example(b'{"kind":"failed","reason":"\xff"}')
@example(b"[" * 100_000)
@given(spoilt(*(encode(message) for message in MESSAGES)))
def test_messages_of_a_hand_over(data: bytes) -> None:
    with contextlib.suppress(msgspec.MsgspecError):
        decode(data)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_of_a_hand_over_that_are_right(message: SwitchData | PortData | PositionsData) -> None:
    assert decode(encode(message)) == message


async def converse(path: Path, lines: list[bytes]) -> None:
    server = ControlServer(ScriptedSwitch(SwitchConfig(ports={"vm1": NullPort()})), path, lambda: None)
    broken: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
    async with server:
        for line in lines:
            reader, writer = await asyncio.open_unix_connection(path, limit=2 * LINE_MAX)
            with contextlib.suppress(ConnectionError):
                writer.write(line + b"\n")
                writer.write_eof()
                answer = await reader.readline()
                assert "id" in json.loads(answer)
            writer.close()
        # It goes on serving.
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(json.dumps(REQUESTS[0]).encode() + b"\n")
        assert "result" in json.loads(await reader.readline())
        writer.close()
    assert broken == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@example(lines=[b'{"method":"\xff","id":1}', b"[" * 50_000])
@given(lines=st.lists(spoilt(*(json.dumps(request).encode() for request in REQUESTS)), min_size=1, max_size=10))
def test_requests_on_the_control_socket(tmp_path: Path, lines: list[bytes]) -> None:
    asyncio.run(converse(tmp_path / "control.sock", lines))
