"""Starting, watching and ending virtiofsd; the one that is installed, and programs that stand in for others."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from viaduct.devices import filesystem
from viaduct.devices.filesystem import FilesystemError, Virtiofsd, find_virtiofsd
from viaduct.virtio.fs_config import FsConfig

RUST = """#!/bin/sh
if [ "$1" = --version ]; then echo 'virtiofsd 1.13.0'; exit; fi
echo "$@" >"$0.arguments"
socket=${1#--socket-path=}
: >"$socket"
exec sleep 1000
"""


def program(directory: Path, text: str) -> Path:
    path = directory / "virtiofsd"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def arguments_of(path: Path) -> str:
    """What it was started with."""
    return Path(f"{path}.arguments").read_text()


async def test_the_newer_one_and_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, RUST)
    monkeypatch.setenv(filesystem.ENVIRONMENT, str(path))
    async with Virtiofsd(tmp_path, read_only=True) as share:
        sandbox = "namespace" if os.geteuid() == 0 else "none"
        assert (
            arguments_of(path)
            == f"--socket-path={share.socket} --shared-dir={tmp_path} --sandbox={sandbox} --readonly\n"
        )
        assert not share.ended.is_set()
        await share.close()
        assert share.ended.is_set()
    assert not share.socket.parent.exists()


async def test_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, RUST.replace("virtiofsd 1.13.0", "using FUSE kernel interface version 7.36"))
    monkeypatch.setenv(filesystem.ENVIRONMENT, str(path))
    async with Virtiofsd(tmp_path, tmp_path / "s"):
        assert arguments_of(path) == f"--socket-path={tmp_path / 's'} -f -o source={tmp_path} -o cache=auto\n"
    assert not (tmp_path / "s").exists()
    with pytest.raises(FilesystemError, match="cannot share read-only"):
        await Virtiofsd(tmp_path, read_only=True).start()


async def test_one_that_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, "#!/bin/sh\necho cannot map that uid >&2\nexit 3\n")
    monkeypatch.setenv(filesystem.ENVIRONMENT, str(path))
    with pytest.raises(FilesystemError, match=r"ended at once; it said:\ncannot map that uid"):
        await Virtiofsd(tmp_path).start()


async def test_one_that_never_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, "#!/bin/sh\n[ $1 = --version ] && exit\nexec sleep 1000\n")
    monkeypatch.setenv(filesystem.ENVIRONMENT, str(path))
    monkeypatch.setattr(filesystem, "PATIENCE", 0.2)
    with pytest.raises(FilesystemError, match="does not listen"):
        await Virtiofsd(tmp_path).start()


async def test_one_that_is_killed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(filesystem.ENVIRONMENT, str(program(tmp_path, RUST)))
    async with Virtiofsd(tmp_path) as share:
        assert share._process is not None
        share._process.kill()
        await asyncio.wait_for(share.ended.wait(), 30)


def test_none_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(filesystem.ENVIRONMENT, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(filesystem, "PLACES", ())
    with pytest.raises(FilesystemError, match="apt-get install virtiofsd"):
        find_virtiofsd()
    monkeypatch.setenv(filesystem.ENVIRONMENT, str(tmp_path / "absent"))
    with pytest.raises(FilesystemError, match="which is no program"):
        find_virtiofsd()
    found = program(tmp_path, RUST)
    monkeypatch.delenv(filesystem.ENVIRONMENT)
    assert find_virtiofsd() == found


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FilesystemError, match="is no directory"):
        Virtiofsd(tmp_path / "absent")


def test_the_configuration_space() -> None:
    assert FsConfig("data", 2).pack() == b"data".ljust(36, b"\0") + b"\2\0\0\0"
    for tag in ("", "x" * 37, "a\0b", "ü" * 19):
        with pytest.raises(ValueError, match="1 to 36"):
            FsConfig(tag).pack()
