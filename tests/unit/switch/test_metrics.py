"""What Prometheus is served: every counter by its name, to nobody who was not meant to see it."""

from __future__ import annotations

import asyncio
import secrets
import socket
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from viaduct._core import drop_reasons
from viaduct.switch.config import ConfigError
from viaduct.switch.metrics_address import MetricsAddress, parse_metrics_address
from viaduct.switch.metrics_server import HEAD_MAX, MetricsServer
from viaduct.switch.switch import Switch

from .test_switch import ALICE, BROADCAST, ethernet, until, write_pcap

GET = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"


async def ask(path: Path, request: bytes = GET) -> tuple[str, str]:
    """Status line and body of an answer."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(request)
    answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return head.partition("\r\n")[0], body


def samples(body: str) -> dict[tuple[str, ...], float]:
    """The value of each sample by its name and label values, in the order in which people would say them."""
    order = ("port", "poller", "cpu", "kind", "direction", "reason", "le")
    found = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels = (sample.labels[label] for label in order if label in sample.labels)
            found[(sample.name, *labels)] = sample.value
    return found


async def test_counters_are_scraped_while_frames_flow(tmp_path: Path) -> None:
    frames = [ethernet(BROADCAST, ALICE, bytes([n])) for n in range(100)]
    path = tmp_path / "metrics.sock"
    async with Switch() as switch, MetricsServer(switch, MetricsAddress(path=str(path))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        await switch.add_port("hole", "null")
        await switch.add_port("player", f"pcap:{write_pcap(tmp_path / 'in.pcap', frames)}")
        await until(lambda: switch.stats().pollers[0].frames == len(frames))
        await switch.add_port("vm1", f"vhost-user:{tmp_path}/vm1.sock")
        status, body = await ask(path)
    assert status == "HTTP/1.1 200 OK"
    found = samples(body)
    octets = sum(map(len, frames))
    assert found["viaduct_port_frames_total", "player", "received"] == len(frames)
    assert found["viaduct_port_bytes_total", "hole", "sent"] == octets
    assert found["viaduct_port_up", "hole", "null"] == 1
    assert found["viaduct_port_up", "vm1", "vhost-user"] == 0
    assert found["viaduct_port_connected", "vm1"] == 0
    assert found["viaduct_stations",] == 1
    assert found["viaduct_events_total", "port-added"] == 3
    assert found["viaduct_poller_frames_total", "0", ""] == len(frames)
    assert found["viaduct_poller_batch_frames_sum", "0", ""] == len(frames)
    assert found["viaduct_poller_batch_frames_bucket", "0", "", "+Inf"] > 0
    assert found["process_resident_memory_bytes",] > 0


async def test_every_reason_for_a_drop_has_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    group = ethernet(BROADCAST, b"\x01" + ALICE[1:], b"")
    async with Switch() as switch, MetricsServer(switch, MetricsAddress(path=str(path))):
        await switch.add_port("hole", "null")
        await switch.add_port("player", f"pcap:{write_pcap(tmp_path / 'in.pcap', [group])}")
        await until(lambda: switch.stats().pollers[0].frames == 1)
        found = samples((await ask(path))[1])
    assert {name[1] for name in found if name[0] == "viaduct_dropped_frames_total"} == set(drop_reasons())
    assert found["viaduct_port_dropped_frames_total", "player", "received", "bad_source"] == 1
    assert found["viaduct_dropped_frames_total", "bad_source"] == 1


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"hello\r\n\r\n", "400 Bad Request"),
        (b"\xff\x00 \xfe\r\n\r\n", "400 Bad Request"),
    ],
)
async def test_other_requests_are_refused(tmp_path: Path, request_: bytes, status: str) -> None:
    path = tmp_path / "metrics.sock"
    async with Switch() as switch, MetricsServer(switch, MetricsAddress(path=str(path))):
        assert (await ask(path, request_))[0] == f"HTTP/1.1 {status}"
        assert (await ask(path))[0] == "HTTP/1.1 200 OK"


async def test_who_sends_without_end_is_hung_up_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    async with Switch() as switch, MetricsServer(switch, MetricsAddress(path=str(path))):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"x" * (4 * HEAD_MAX))
        with suppress(ConnectionError):  # an end with bytes unread may be one
            assert await reader.read() == b""
        writer.close()
    assert not path.exists()


async def test_loopback_is_served(unused_address: tuple[str, int]) -> None:
    host, port = unused_address
    async with Switch() as switch, MetricsServer(switch, parse_metrics_address(f"{host}:{port}")):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"HEAD /metrics HTTP/1.0\r\n\r\n")
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n")


@pytest.fixture
def unused_address() -> tuple[str, int]:
    """A TCP port that nobody listens on, of a loopback address that nobody else uses: so nobody takes it meanwhile, as
    connections from 127.0.0.1 would."""
    host = f"127.{secrets.randbelow(254) + 1}.{secrets.randbelow(256)}.{secrets.randbelow(254) + 1}"
    with socket.socket() as sock:
        sock.bind((host, 0))
        return host, int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("127.0.0.1:9100", "http://127.0.0.1:9100/metrics"),
        ("localhost:9100", "http://127.0.0.1:9100/metrics"),
        ("[::1]:9100", "http://[::1]:9100/metrics"),
        ("public:0.0.0.0:9100", "http://0.0.0.0:9100/metrics"),
        ("unix:/run/m.sock", "unix:/run/m.sock"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(parse_metrics_address(text)) == shown


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0.0.0.0:9100", r"can be reached from other hosts.*public:0\.0\.0\.0:9100"),
        ("[::]:9100", "can be reached from other hosts"),
        ("192.0.2.1:9100", "can be reached from other hosts"),
        ("here:9100", "'here' is no IP address"),
        ("127.0.0.1", "is no port"),
        ("127.0.0.1:0", "is no port"),
        ("127.0.0.1:65536", "is no port"),
        ("unix:", "the path is missing"),
    ],
)
def test_addresses_that_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_metrics_address(text)
