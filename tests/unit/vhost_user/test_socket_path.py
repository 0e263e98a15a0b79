"""Paths that cannot work, stale and live sockets, client mode."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import Guest
from viaduct.vhost_user import Backend, SocketPathError


async def refused(path: str, client: bool = False) -> str:
    with pytest.raises(SocketPathError) as caught:
        await Backend(RecordingDevice(), path, client=client).start()
    return str(caught.value)


@pytest.mark.parametrize("client", [False, True])
async def test_too_long(socket_dir: Path, client: bool) -> None:
    path = str(socket_dir / ("x" * (108 - len(str(socket_dir)) - 1)))
    assert len(path) == 108
    assert f"{path} has 108 bytes; a UNIX socket's path may have 107" in await refused(path, client)
    async with Backend(RecordingDevice(), path[:-1]):
        assert os.listdir(socket_dir) == [os.path.basename(path[:-1])]


async def test_bytes_are_counted_not_characters(socket_dir: Path) -> None:
    assert "has 1" in await refused(str(socket_dir / ("é" * 60)))


@pytest.mark.parametrize("path", ["", "a\0b"])
async def test_no_path(path: str) -> None:
    assert "is empty or has a NUL in it" in await refused(path)


async def test_missing_directory(socket_dir: Path) -> None:
    said = await refused(str(socket_dir / "none" / "port.sock"))
    assert f"the directory {socket_dir}/none does not exist (mkdir -p {socket_dir}/none)" in said


async def test_a_file_for_a_directory(socket_dir: Path) -> None:
    (socket_dir / "file").touch()
    assert f"{socket_dir}/file is no directory" in await refused(str(socket_dir / "file" / "port.sock"))


async def test_a_file_in_the_way(socket_dir: Path) -> None:
    file = socket_dir / "file"
    file.write_text("precious")
    assert "exists and is no socket" in await refused(str(file))
    assert file.read_text() == "precious"


async def test_no_permission(socket_dir: Path) -> None:
    """As an ordinary user, whoever runs the tests: effective ids are put back before anything else happens."""
    closed = f"{socket_dir}/closed"
    os.mkdir(closed, 0o500)
    user = os.geteuid()
    if user == 0:
        os.chmod(socket_dir, 0o755)
        os.seteuid(65534)
    try:
        said = await refused(f"{closed}/port.sock")
    finally:
        os.seteuid(user)
    assert f"may not write there (Permission denied); change the permissions of {closed}" in said


async def test_a_stale_socket_is_replaced(socket_dir: Path) -> None:
    path = str(socket_dir / "port.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    async with Backend(RecordingDevice(), path):
        guest = Guest(path)
        assert (await guest.ask(1)).u64
        guest.close()


async def test_a_live_socket_is_not(socket_dir: Path) -> None:
    path = str(socket_dir / "port.sock")
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(path)
        alive.listen()
        assert f"{path} is in use: a process listens on it" in await refused(path)
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(path)


async def test_a_live_socket_with_a_full_queue_is_not(socket_dir: Path) -> None:
    path = str(socket_dir / "port.sock")
    with socket.socket(socket.AF_UNIX) as alive, socket.socket(socket.AF_UNIX) as caller:
        alive.bind(path)
        alive.listen(0)
        caller.connect(path)
        assert "is in use" in await refused(path)


async def test_a_port_of_ours_is_live_too(backend: Backend) -> None:
    assert "is in use" in await refused(backend.path)


async def test_close_leaves_somebody_elses_socket(socket_dir: Path) -> None:
    path = str(socket_dir / "port.sock")
    backend = Backend(RecordingDevice(), path)
    await backend.start()
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        await backend.close()
        assert os.listdir(socket_dir) == ["port.sock"]


async def test_client_connects_whenever_somebody_listens(socket_dir: Path, device: RecordingDevice) -> None:
    path = str(socket_dir / "front-end.sock")
    loop = asyncio.get_running_loop()
    async with Backend(device, path, client=True):
        await asyncio.sleep(0.01)
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.setblocking(False)
                listener.bind(path)
                listener.listen()
                connection, _ = await loop.sock_accept(listener)
                with connection:
                    connection.send(bytes([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]))
                    assert len(await loop.sock_recv(connection, 100)) == 20
            os.unlink(path)


async def test_client_says_what_is_wrong_and_tries_again(
    socket_dir: Path, device: RecordingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(socket_dir / "port.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(path)
        async with Backend(device, path, client=True):
            await asyncio.sleep(0.01)
    assert "what listens there is no stream socket" in caplog.text
