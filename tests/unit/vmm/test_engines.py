"""Why there is no KVM, said for each reason, and what to do."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from viaduct.vmm import engines
from viaduct.vmm.engines import EngineUnavailableError, Host


def host(directory: Path, flags: str = "", module: str | None = None) -> Host:
    """A host without a device."""
    (directory / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    (directory / "module").mkdir()
    if module:
        (directory / "module" / module).mkdir()
    return Host(directory / "kvm", directory / "cpuinfo", directory / "module")


def test_this_host_has_kvm() -> None:
    assert engines.kvm_problem() is None
    assert engines.choose() == engines.choose("kvm") == "kvm"


@pytest.mark.parametrize(
    ("flags", "module", "said"),
    [
        ("hypervisor sse", None, ["nested virtualization", "nested=1", "-cpu host"]),
        ("sse", None, ["firmware", "VT-x"]),
        ("vmx", None, ["modprobe kvm_intel"]),
        ("svm hypervisor", None, ["modprobe kvm_amd"]),
        ("svm", "kvm_amd", ["mknod", "--device"]),
    ],
)
def test_a_missing_device_is_explained(tmp_path: Path, flags: str, module: str | None, said: list[str]) -> None:
    problem = engines.kvm_problem(host(tmp_path, flags, module))
    assert problem is not None
    for words in said:
        assert words in problem
    with pytest.raises(EngineUnavailableError, match=r"there is no .*/kvm"):
        engines.choose("auto", Host(tmp_path / "kvm", tmp_path / "cpuinfo", tmp_path / "module"))


def test_without_permission_the_group_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.touch()

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    device.chmod(0o660)
    problem = engines.kvm_problem(Host(device))
    assert problem is not None
    assert "usermod --append --groups" in problem
    device.chmod(0o600)
    problem = engines.kvm_problem(Host(device))
    assert problem is not None
    assert "chmod 0660" in problem


def test_a_session_that_began_before_its_user_joined_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o660)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    user = pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group(("kvm", "x", gid, [user])))
    problem = engines.kvm_problem(Host(device))
    assert problem is not None
    assert "log in again (or, for this shell only: newgrp kvm)" in problem
    assert "usermod" not in problem


def test_a_file_that_is_not_kvm_is_told(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    assert "is not KVM" in str(engines.kvm_problem(Host(device)))


@pytest.mark.parametrize(
    ("version", "error", "said"),
    [(11, None, "version 11"), (12, errno.EBUSY, "another hypervisor"), (12, errno.ENOMEM, "makes no machine")],
)
def test_a_kvm_that_makes_no_machine_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, error: int | None, said: str
) -> None:
    device = tmp_path / "kvm"
    device.touch()

    def ioctl(_: int, request: int, *__: Any) -> int:
        if request == engines.KVM_GET_API_VERSION:
            return version
        assert error is not None
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert said in str(engines.kvm_problem(Host(device)))


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="auto and kvm"):
        engines.choose("tcg")
