"""The virtio devices that a configuration asks for, in the order in which the guest finds them."""

from __future__ import annotations

from contextlib import AsyncExitStack

from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.vmm.back_end import BackEnd
from viaduct.vmm.back_end.in_process import InProcessBackEnd
from viaduct.vmm.config import MachineConfig
from viaduct.vmm.errors import MachineError
from viaduct.vmm.nic import mac_of, open_virtio


async def back_ends(
    config: MachineConfig, machine: str, console: ConsoleTerminal, stack: AsyncExitStack
) -> list[tuple[str, BackEnd]]:
    """Name and back-end of each device, not opened yet; `stack` ends what is made for them.

    Raises:
        MachineError: what the configuration names cannot be had.
    """
    found: list[tuple[str, BackEnd]] = []
    for index, nic in enumerate(config.nics):
        if nic.path != "emulated":
            found.append((f"net{index}", await open_virtio(nic, mac_of(nic, machine, index), machine, stack)))
    if config.rng:
        from viaduct.devices.entropy import Entropy

        found.append(("rng0", InProcessBackEnd(Entropy())))
    for index, name in enumerate(config.devices):
        from viaduct.devices.user_class import DeviceClassError, load_device

        try:
            found.append((f"device{index}", InProcessBackEnd(load_device(name))))
        except DeviceClassError as error:
            raise MachineError(f"--device {name}: {error}") from error
    return found
