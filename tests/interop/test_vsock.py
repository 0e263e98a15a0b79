"""The socket device under QEMU's vhost-user-vsock-pci: Linux's own AF_VSOCK, both ways, megabytes with checksums."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop.device_process import VhostUser, device_process
from interop.guest_image import GuestImage
from interop.peer_process import PATIENCE, PeerError
from interop.qemu import Guest

MEBIBYTES = 4


pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def vsock_guest(directory: Path, device_image: GuestImage) -> Iterator[tuple[Guest, Path]]:
    """A guest with CID 42, and the path at which the host's programs find it."""
    path = directory / "v"
    process = device_process("vsock", directory / "s", "--path", path, "--cid", "42")
    try:
        with Guest("vm", device_image, directory, (VhostUser("vhost-user-vsock-pci", directory / "s"),)) as guest:
            yield guest, path
    finally:
        process.stop()


def dial(path: Path, port: int) -> socket.socket:
    """Connects to the guest's `port`, as soon as somebody listens there."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        sock.sendall(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n") and (part := sock.recv(1)):
            line += part
        if line.startswith(b"OK "):
            return sock
        sock.close()
    raise PeerError(f"nobody in the guest listens on port {port}")


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_the_host_reaches_the_guest(vsock_guest: tuple[Guest, Path]) -> None:
    guest, path = vsock_guest
    for round_ in range(3):
        # What comes in is counted and goes back with a checksum, once the host has closed its direction.
        guest.run(
            f"rm -f /tmp/pipe; mkfifo /tmp/pipe; vsock listen {5000 + round_} </tmp/pipe | sha256sum >/tmp/pipe &"
        )
        data = random.Random(round_).randbytes(MEBIBYTES << 20)
        sock = dial(path, 5000 + round_)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock).split()
        assert answer[0].decode() == hashlib.sha256(data).hexdigest()
        sock.close()


def test_the_guest_reaches_the_host(vsock_guest: tuple[Guest, Path]) -> None:
    guest, path = vsock_guest
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}_53")
    listener.listen()
    listener.settimeout(PATIENCE)
    sums = []

    def serve() -> None:
        for _ in range(3):
            sock, _ = listener.accept()
            sock.settimeout(PATIENCE)
            data = read_all(sock)
            sums.append(hashlib.sha256(data).hexdigest())
            sock.sendall(data[::-1])
            sock.close()

    server = threading.Thread(target=serve)
    server.start()
    for _ in range(3):
        script = f"dd if=/dev/urandom of=/tmp/out bs=1M count={MEBIBYTES} 2>/dev/null; sha256sum </tmp/out"
        there = guest.run(script).split()[0]
        back = guest.run("vsock connect 2 53 </tmp/out | wc -c").strip()
        assert back == str(MEBIBYTES << 20)
        assert sums[-1] == there
    server.join()
    listener.close()
    assert "reset" in guest.run("vsock connect 2 54 </dev/null 2>&1", check=False).lower()


def test_many_at_once_and_a_guest_that_is_reset(vsock_guest: tuple[Guest, Path]) -> None:
    guest, path = vsock_guest
    for round_ in range(2):
        guest.run("for i in $(seq 20); do mkfifo /tmp/p$i; vsock listen $((6000 + i)) </tmp/p$i | cat >/tmp/p$i & done")
        socks = [dial(path, 6000 + number) for number in range(1, 21)]
        data = os.urandom(20000)
        for sock in socks:
            sock.sendall(data)
        for sock in socks:
            back = b""
            while len(back) < len(data):
                back += sock.recv(1 << 16)
            assert back == data
        if round_ == 0:
            guest.reset()
        for sock in socks:
            sock.close()
