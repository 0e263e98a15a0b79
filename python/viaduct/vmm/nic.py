"""Network cards by one word each: where frames go, and who serves the card.

| `to` | `path=virtio` | `path=vhost` | `path=emulated` |
|---|---|---|---|
| `vhost-user:PATH` | rings served by that back-end | - | a card in this process, plugged into that back-end |
| `switch:NAME` | the same, by a running `viaduct switch` | - | the same |
| `tap:IF` | rings served by this process | rings served by the kernel | a card in this process, on that interface |
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import msgspec

from viaduct.switch.config import InProcessPort, SwitchConfig, TapPort
from viaduct.switch.config_error import ConfigError
from viaduct.switch.control_client import ControlClient
from viaduct.switch.control_wire import ControlError
from viaduct.virtio.features import DeviceType, NetFeature
from viaduct.virtio.net_config import NetConfig
from viaduct.vmm.back_end import BackEnd
from viaduct.vmm.config import MachineConfig, NicConfig
from viaduct.vmm.errors import MachineError

_PAIR = (256, 256)
_MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_SEVERAL_PAIRS = NetFeature.MQ | NetFeature.CTRL_VQ
"""Need a control queue, which back-ends leave to the machine (`viaduct.vmm.back_end.queue_pairs`)."""
_BY_COMMANDS = (
    NetFeature.CTRL_GUEST_OFFLOADS
    | NetFeature.CTRL_RX
    | NetFeature.CTRL_RX_EXTRA
    | NetFeature.CTRL_VLAN
    | NetFeature.CTRL_MAC_ADDR
    | NetFeature.GUEST_ANNOUNCE
    | NetFeature.NOTF_COAL
    | NetFeature.HASH_REPORT
    | NetFeature.RSS
)
"""Need commands that this control queue does not know; back-ends offer some of them for front-ends that do (DPDK's
vhost library). A driver refuses a card that offers them without a control queue (virtio 1.2, 5.1.3.1)."""


def mac_of(nic: NicConfig, machine: str, index: int) -> bytes:
    """The card's address: the one that was given, or one that stays the same for this machine and card on this host.

    Machines are named vm1, vm2, ... on every host, and hosts are joined by tunnels: so the host is part of it.
    """
    if nic.mac is not None:
        return bytes.fromhex(nic.mac.replace(":", "").replace("-", ""))
    digest = hashlib.sha256(f"viaduct/{_host()}/{machine}/{index}".encode()).digest()
    return b"\x52\x54\x00" + digest[:3]


def _host() -> str:
    """What tells this host from others, as long as it is installed (machine-id(5)); without that, its name."""
    for path in _MACHINE_IDS:
        with suppress(OSError):
            if found := path.read_text(encoding="ascii", errors="replace").strip():
                return found
    return socket.gethostname()


def with_macs(config: MachineConfig, machine: str) -> MachineConfig:
    """The same configuration with every address said, so that a restored machine of another name keeps them."""
    nics = tuple(
        msgspec.structs.replace(nic, mac=mac_of(nic, machine, index).hex(":")) for index, nic in enumerate(config.nics)
    )
    return msgspec.structs.replace(config, nics=nics)


async def open_virtio(nic: NicConfig, mac: bytes, machine: str, stack: AsyncExitStack) -> BackEnd:
    """Whoever will serve this card's rings; `stack` ends what is made for it.

    Raises:
        MachineError: nobody is there, or what the card names cannot be had.
    """
    back_end = await _open_pairs(nic, mac, machine, stack)
    if nic.queues == 1:
        return back_end
    from viaduct.vmm.back_end.queue_pairs import QueuePairsBackEnd

    return QueuePairsBackEnd(back_end, nic.queues)


async def _open_pairs(nic: NicConfig, mac: bytes, machine: str, stack: AsyncExitStack) -> BackEnd:
    """Whoever will serve the pairs of queues; a control queue is not theirs."""
    if nic.path == "vhost":
        from viaduct.vmm.back_end.vhost_net import VhostNetBackEnd

        return VhostNetBackEnd(nic.target, mac, nic.queues)
    if nic.kind == "tap":
        return await _private_switch(nic, mac, stack)
    from viaduct.vmm.back_end.vhost_user import VhostUserBackEnd

    return VhostUserBackEnd(
        await socket_of(nic, machine),
        DeviceType.NET,
        _PAIR * nic.queues,
        config=NetConfig(mac=mac).pack(),
        adds=NetFeature.MAC | NetFeature.STATUS,
        hides=_BY_COMMANDS | (_SEVERAL_PAIRS if nic.queues == 1 else NetFeature.CTRL_VQ),
    )


async def socket_of(nic: NicConfig, machine: str) -> str:
    """The vhost-user socket that the card plugs into. Raises `MachineError`."""
    if nic.kind == "vhost-user":
        return nic.target
    # The switch may run on this very loop.
    return await asyncio.to_thread(_socket_of_switch, nic.target, machine, nic.queues)


async def _private_switch(nic: NicConfig, mac: bytes, stack: AsyncExitStack) -> BackEnd:
    """A switch of two ports in this process: the guest's card and the interface."""
    from viaduct.switch.switch import Switch
    from viaduct.vmm.back_end.in_process import InProcessBackEnd

    try:
        guest, interface = InProcessPort(queues=nic.queues), TapPort(ifname=nic.target, queues=nic.queues)
        switch = Switch(SwitchConfig(ports={"guest": guest, "interface": interface}))
        await stack.enter_async_context(switch)
    except ConfigError as error:
        raise MachineError(f"tap {nic.target}: {error.problem}") from error
    from viaduct.switch.ports.in_process import InProcess

    port = switch.members["guest"]
    assert isinstance(port, InProcess)
    device = port.device
    device.features = device.features & ~int(_SEVERAL_PAIRS) | int(NetFeature.MAC)
    device.net_config = device.net_config._replace(mac=mac)
    return InProcessBackEnd(device)


def _socket_of_switch(name: str, machine: str, queues: int) -> str:
    """The socket of the port `name` of the switch that runs; the port is made if the switch has none of that name."""
    try:
        with ControlClient() as switch:
            ports = {port["name"]: port for port in switch.call("port.list")}
            if name not in ports:
                path = str(Path(switch.path).with_name(f"{name}.sock"))
                switch.call("port.add", name=name, port={"kind": "vhost-user", "path": path, "queues": queues})
                return path
            port = ports[name]
    except ControlError as error:
        raise MachineError(f"switch:{name}: {error}") from error
    if port["kind"] != "vhost-user":
        raise MachineError(
            f"switch:{name}: that port is a {port['kind']} port, into which no machine plugs; name another one, and it "
            "will be made"
        )
    if port.get("peer"):
        raise MachineError(
            f"switch:{name}: the port is taken, by pid {port['peer']['pid']}; name another one for machine {machine}"
        )
    return str(port["config"]).partition(":")[2].partition(",")[0]
