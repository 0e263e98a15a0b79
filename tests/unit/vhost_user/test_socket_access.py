"""Who may use a port's socket: the permissions of its file and the list of users."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import socket
import stat
from pathlib import Path

import pytest

from vhost_user.stand_ins import RecordingDevice
from viaduct.vhost_user import Backend, SocketPathError
from viaduct.vhost_user.device import Peer
from viaduct.vhost_user.socket_access import (
    Allowed,
    SocketAccess,
    check_mode,
    credentials,
    resolve_allow,
)


class Refusing(RecordingDevice):
    """Keeps what was refused."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[tuple[Peer, str]] = []
        self.has_refused = asyncio.Event()

    def peer_refused(self, peer: Peer, reason: str) -> None:
        self.refused.append((peer, reason))
        self.has_refused.set()


async def is_served(path: str) -> bool:
    """Whether a connection stays open."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        async with asyncio.timeout(0.5):
            return bool(await reader.read(1))
    except TimeoutError:
        return True
    finally:
        writer.close()


async def test_mode_and_group_of_the_file(socket_dir: Path) -> None:
    path = str(socket_dir / "port.sock")
    group = os.getegid()
    async with Backend(RecordingDevice(), path, access=SocketAccess(mode=0o660, gid=group)):
        state = os.stat(path)
        assert stat.S_IMODE(state.st_mode) == 0o660
        assert state.st_gid == group


async def test_whoever_is_not_on_the_list_is_hung_up_on_and_named(socket_dir: Path) -> None:
    path, device = str(socket_dir / "port.sock"), Refusing()
    access = SocketAccess(allow=(Allowed(os.geteuid() + 1, None), Allowed(None, 4_000_000_000)))
    async with Backend(device, path, access=access) as backend:
        assert not await is_served(path)
        assert backend.peer is None
    ((peer, reason),) = device.refused
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert f"pid {os.getpid()} has uid {os.geteuid()}" in reason
    assert f"allowed: uid {os.geteuid() + 1}, any user in group 4000000000" in reason


@pytest.mark.parametrize("by", ["user", "group", "both"])
async def test_whoever_is_on_the_list_is_served(socket_dir: Path, by: str) -> None:
    user, group = (os.geteuid() if by != "group" else None), (os.getegid() if by != "user" else None)
    path, device = str(socket_dir / "port.sock"), Refusing()
    async with Backend(device, path, access=SocketAccess(allow=(Allowed(user, group),))):
        assert await is_served(path)
    assert device.refused == []


async def test_the_right_user_in_the_wrong_group_is_not_served(socket_dir: Path) -> None:
    path, device = str(socket_dir / "port.sock"), Refusing()
    async with Backend(device, path, access=SocketAccess(allow=(Allowed(os.geteuid(), 4_000_000_000),))):
        assert not await is_served(path)


async def test_a_listener_of_another_user_is_not_served_by_a_client(socket_dir: Path) -> None:
    path, device = str(socket_dir / "port.sock"), Refusing()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        access = SocketAccess(allow=(Allowed(os.geteuid() + 1, None),))
        async with Backend(device, path, client=True, access=access), asyncio.timeout(30):
            await device.has_refused.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others")
async def test_another_user_can_connect_by_group_and_is_seen_as_himself(socket_dir: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    path, device = str(socket_dir / "port.sock"), Refusing()
    os.chmod(socket_dir, 0o755)

    def connect() -> int:
        """Connect as nobody, in a child. Returns what went wrong, as an error number, or 0."""
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(nobody.pw_gid)
                os.setuid(nobody.pw_uid)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)
                    sock.settimeout(60)
                    os._exit(0 if sock.recv(1) == b"" else errno.EBADMSG)
            except OSError as error:
                os._exit(error.errno or 255)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    async with Backend(device, path, access=SocketAccess(mode=0o600, gid=nobody.pw_gid)):
        assert await asyncio.to_thread(connect) == errno.EACCES, "the file does not let him"
        assert device.refused == []
    access = SocketAccess(mode=0o660, gid=nobody.pw_gid, allow=(Allowed(0, None),))
    async with Backend(device, path, access=access):
        assert await asyncio.to_thread(connect) == 0, "the file lets him, and then he is hung up on"
    assert [peer.uid for peer, _ in device.refused] == [nobody.pw_uid]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others")
async def test_a_group_that_is_not_ours_cannot_be_given(socket_dir: Path) -> None:
    os.chmod(socket_dir, 0o777)
    path = str(socket_dir / "port.sock")
    before = os.geteuid()
    os.seteuid(65534)
    try:
        with pytest.raises(SocketPathError, match=r"may only give files to groups that it is in .*CAP_CHOWN"):
            await Backend(RecordingDevice(), path, access=SocketAccess(gid=54321)).start()
    finally:
        os.seteuid(before)
    assert not os.access(path, os.F_OK)


def test_supplementary_groups_are_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid, uid, groups = credentials(ours)
    assert (pid, uid) == (os.getpid(), os.geteuid())
    assert groups == {os.getegid(), *os.getgroups()}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have other groups")
def test_supplementary_groups_of_others_are_known() -> None:
    child = os.fork()
    if child == 0:
        os.setgroups([54001, 54002])
        inner, _ = socket.socketpair()
        os._exit(0 if credentials(inner)[2] == {os.getegid(), 54001, 54002} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_names_are_resolved() -> None:
    assert resolve_allow("root+1000:0+:root") == (Allowed(0, None), Allowed(1000, 0), Allowed(None, 0))
    with pytest.raises(ValueError, match="no user 'nobody-at-all'"):
        resolve_allow("nobody-at-all")
    with pytest.raises(ValueError, match="no group 'nothing-at-all'"):
        resolve_allow(":nothing-at-all")
    for text in ("", "+", ":", "a b", "a:b:c"):
        with pytest.raises(ValueError, match="is no list of users"):
            resolve_allow(text)


@pytest.mark.parametrize("text", ["rw", "66", "0668", "07777", "-660"])
def test_modes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="three octal digits"):
        check_mode(text)
    assert check_mode("0660") == check_mode("660") == 0o660
