"""The console under QEMU: Linux's hvc and its named ports, by the generic vhost-user front-end of QEMU 10."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop.device_process import VhostUser, device_process
from interop.generic_qemu import MODEL, generic_qemu
from interop.guest_image import GuestImage
from interop.peer_process import PATIENCE
from interop.qemu import Guest

SINGLE = {"virtio-id": "3", "num_vqs": "2", "config_size": "12"}
SEVERAL = {"virtio-id": "3", "num_vqs": "6", "config_size": "12"}


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    return sock


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        part = sock.recv(4096)
        assert part, data
        data += part
    return data


@pytest.fixture
def console_guest(directory: Path, device_image: GuestImage, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest with /dev/hvc0, and with `several` a port named agent as well."""
    several, packed = request.param
    options = ["--port", f"agent=socket:{directory / 'agent'}"] if several else []
    process = device_process("console", directory / "s", "--console", f"socket:{directory / 'con'}", *options)
    properties = (SEVERAL if several else SINGLE) | {"packed": "on" if packed else "off"}
    device = VhostUser(MODEL, directory / "s", properties)
    try:
        with Guest("vm", device_image, directory, (device,), qemu=generic_qemu(directory)) as guest:
            yield guest
    finally:
        process.stop()


@pytest.mark.parametrize(
    "console_guest", [(False, False), (False, True), (True, False)], ids=["split", "packed", "several"], indirect=True
)
def test_a_terminal(console_guest: Guest, directory: Path) -> None:
    guest = console_guest
    sock = connect(directory / "con")
    for _ in range(2):
        # Its modes last as long as it is open.
        guest.run('(stty raw -echo; echo up; while read -r l; do echo "got $l"; done) </dev/hvc0 >/dev/hvc0 2>&1 &')
        read_until(sock, b"up\n")
        for number in range(20):
            sock.sendall(b"line %d\n" % number)
            assert read_until(sock, b"got line %d\n" % number)
        guest.run("seq 20000 >/dev/hvc0")
        text = read_until(sock, b"\n20000\n")
        assert b"\n9999\n10000\n10001\n" in text
        guest.reset()


@pytest.mark.parametrize("console_guest", [(True, False)], ids=["several"], indirect=True)
def test_a_named_port(console_guest: Guest, directory: Path) -> None:
    guest = console_guest
    port = guest.run("echo /dev/$(basename $(dirname $(grep -l agent /sys/class/virtio-ports/*/name)))").strip()
    sock = connect(directory / "agent")
    sock.sendall(b"early words\n")
    assert guest.run(f"head -n 1 <{port}").strip() == "early words"
    guest.run(f"seq 5000 >{port}")
    assert read_until(sock, b"\n5000\n").startswith(b"1\n2\n3\n")
