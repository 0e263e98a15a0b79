"""Which engine runs a machine here, and, where none can, exactly why and what to do.

KVM can be missing in six ways, which look the same to a program that only tries to open it: the processor cannot do
it; the processor could, but this host is itself a virtual machine without nested virtualization, or its firmware has
switched it off; the kernel's module is not loaded; the device file is missing; it belongs to a group that the user is
not in; another hypervisor has taken the processor's extensions. Each has its own next step.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
API_VERSION = 12
"""What every Linux since 2.6.22 says; it will not change (Linux Documentation/virt/kvm/api.rst, 4.1)."""
MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}

EngineName = Literal["kvm"]


class EngineUnavailableError(Exception):
    """No engine that was asked for can run a machine here. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where to look. Tests look elsewhere."""

    device: Path = Path("/dev/kvm")
    cpuinfo: Path = Path("/proc/cpuinfo")
    modules: Path = Path("/sys/module")


def choose(engine: str = "auto", host: Host | None = None) -> EngineName:
    """The engine for `auto` or for the name of one. Raises EngineUnavailableError, or ValueError for another name."""
    if engine not in ("auto", "kvm"):
        raise ValueError(f"engine {engine!r}: allowed are auto and kvm")
    if problem := kvm_problem(host or Host()):
        raise EngineUnavailableError(problem)
    return "kvm"


def kvm_problem(host: Host | None = None) -> str | None:
    """Why KVM cannot run machines for this user on this host, and what to do; None where it can."""
    host = host or Host()
    try:
        kvm = os.open(host.device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _why_no_device(host)
    except PermissionError:
        return _why_no_permission(host.device)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            return _why_no_device(host)
        return f"{host.device} cannot be opened: {error.strerror}"
    try:
        return _why_no_machine(host.device, kvm)
    finally:
        os.close(kvm)


def _why_no_machine(device: Path, kvm: int) -> str | None:
    try:
        version = fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0)
    except OSError as error:
        return f"{device} is not KVM: it does not answer a question for its version ({error.strerror})"
    if version != API_VERSION:
        return f"{device} speaks version {version} of KVM's interface; every Linux since 2.6.22 speaks {API_VERSION}"
    try:
        os.close(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return (
                f"{device} is there, but another hypervisor (VirtualBox, VMware) uses the processor's extensions: "
                "end its machines, or unload its module, and try again"
            )
        return f"{device} is there, but makes no machine: {error.strerror}"
    return None


def _why_no_permission(device: Path) -> str:
    status = device.stat()
    group = _group_name(status.st_gid)
    user = _user_name()
    if status.st_mode & 0o060 != 0o060:
        return (
            f"{device} may be opened only by its owner (mode {status.st_mode & 0o777:04o}): as root, "
            f"chgrp kvm {device} && chmod 0660 {device}, and become a member of the group kvm: "
            f"usermod --append --groups kvm {user}"
        )
    if user in _members(status.st_gid):
        return (
            f"{device} may be opened by the group {group}, of which {user} is a member, but this session began before: "
            f"log in again (or, for this shell only: newgrp {group})"
        )
    return (
        f"{device} may be opened by the group {group}, and {user} is not in it: as root, "
        f"usermod --append --groups {group} {user}, then log in again (or, for this shell only: newgrp {group})"
    )


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _members(gid: int) -> list[str]:
    try:
        return grp.getgrgid(gid).gr_mem
    except KeyError:
        return []


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _why_no_device(host: Host) -> str:
    flags = _processor_flags(host.cpuinfo)
    missing = f"there is no {host.device}"
    extension = next((flag for flag in MODULES if flag in flags), None)
    if extension is None and "hypervisor" in flags:
        return (
            f"{missing}: this host is itself a virtual machine, and its hypervisor does not give it nested "
            "virtualization (no vmx or svm in /proc/cpuinfo). Switch it on there: on Linux, load kvm_intel or kvm_amd "
            "with nested=1 and give the machine its processor's features (QEMU: -cpu host); at a cloud, choose a "
            "machine type with nested virtualization"
        )
    if extension is None:
        return (
            f"{missing}, and the processor has no extension for virtualization that is switched on (no vmx or svm in "
            "/proc/cpuinfo): look for Intel VT-x or AMD SVM in the firmware's settings"
        )
    module = MODULES[extension]
    if not (host.modules / module).is_dir():
        return (
            f"{missing}: the processor can do it ({extension}), and the kernel's module is not loaded: as root, "
            f"modprobe {module}. If that says that the BIOS has disabled it, switch it on in the firmware's settings"
        )
    return (
        f"{missing} although the module {module} is loaded: as root, mknod {host.device} c 10 232; in a container, "
        f"give it the device (docker run --device {host.device})"
    )


def _processor_flags(cpuinfo: Path) -> frozenset[str]:
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
