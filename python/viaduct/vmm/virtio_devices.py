"""The virtio devices that a configuration asks for, in the order in which the guest finds them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from viaduct._core import ImageError
from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.vhost_user.device import Device
from viaduct.virtio.features import DeviceType
from viaduct.vmm.back_end import BackEnd
from viaduct.vmm.back_end.in_process import InProcessBackEnd
from viaduct.vmm.config import MachineConfig, ShareConfig
from viaduct.vmm.errors import MachineError

QUEUE_SIZE = 256
"""Descriptors of the queues whose back-end leaves that to us."""


async def back_ends(
    config: MachineConfig,
    machine: str,
    console: ConsoleTerminal,
    stack: AsyncExitStack,
    own: Sequence[tuple[str, Device]] = (),
) -> AsyncIterator[tuple[str, BackEnd]]:
    """Name and back-end of each device, not opened yet; `own` are the user's, `stack` ends what is made for the others.

    Raises:
        MachineError: what the configuration names cannot be had.
    """
    for name, disk in [(name, _in_process(device, stack)) for name, device in _disks(config)]:
        yield name, disk
    for index, nic in enumerate(config.nics):
        if nic.path != "emulated":
            from viaduct.vmm.nic import mac_of, open_virtio

            yield f"net{index}", await open_virtio(nic, mac_of(nic, machine, index), machine, stack)
    if config.console_device == "virtio":
        from viaduct.devices.console import Console

        yield "console", _in_process(Console(console), stack)
    if config.rng:
        from viaduct.devices.entropy import Entropy

        yield "rng", _in_process(Entropy(), stack)
    if config.balloon:
        from viaduct.devices.balloon import Balloon

        yield "balloon", _in_process(Balloon(), stack)
    if config.vsock is not None:
        from viaduct.devices.vsock import Vsock

        yield "vsock", _in_process(Vsock(config.vsock), stack)
    for index, share in enumerate(config.shares):
        yield f"share{index}", await _share(share, stack)
    for name, device in own:
        yield name, _back_end(device)


def _in_process(device: Device, stack: AsyncExitStack) -> BackEnd:
    stack.callback(device.close)
    return InProcessBackEnd(device)


def _back_end(device: Device) -> BackEnd:
    """Of a device of the user's own, which may say of itself what cannot be."""
    try:
        return InProcessBackEnd(device)
    except (AttributeError, TypeError) as error:
        raise MachineError(f"{type(device).__name__} cannot be a device: {error} (docs/devices.md)") from error


def _disks(config: MachineConfig) -> list[tuple[str, Device]]:
    from viaduct.devices.block import BlockDevice

    disks: list[tuple[str, Device]] = []
    try:
        for index, disk in enumerate(config.disks):
            device = BlockDevice(
                disk.file, format=disk.format, read_only=disk.read_only, queues=config.cpus, serial=disk.serial or ""
            )
            disks.append((f"disk{index}", device))
    except (ImageError, ValueError) as error:
        for _, opened in disks:
            opened.close()
        raise MachineError(f"--disk {disk.file}: {error}") from error
    return disks


async def _share(share: ShareConfig, stack: AsyncExitStack) -> BackEnd:
    """A directory, which a virtiofsd of its own serves for as long as the machine lives."""
    from viaduct.devices.filesystem import FilesystemError, Virtiofsd
    from viaduct.virtio.fs_config import FsConfig
    from viaduct.vmm.back_end.vhost_user import VhostUserBackEnd

    try:
        config = FsConfig(share.tag or Path(share.directory).name).pack()
        server = await stack.enter_async_context(Virtiofsd(share.directory))
    except (FilesystemError, ValueError) as error:
        raise MachineError(f"--share {share.directory}: {error}") from error
    return VhostUserBackEnd(str(server.socket), DeviceType.FS, (QUEUE_SIZE, QUEUE_SIZE), config=config)
