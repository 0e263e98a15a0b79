"""The kinds of port: how each comes to be, what it tells about itself, and how it goes."""

from __future__ import annotations

from viaduct.switch.config import InProcessPort, NullPort, PcapPort, PortConfig, TapPort, VhostUserPort

from .port import Port, PortOwner


def make_port(owner: PortOwner, name: str, config: PortConfig) -> Port:
    """The port that `config` describes, not opened yet."""
    match config:
        case VhostUserPort():
            from .vhost_user import VhostUser

            return VhostUser(owner, name, config)
        case TapPort():
            from .tap import Tap

            return Tap(owner, name, config)
        case PcapPort():
            from .pcap import Pcap

            return Pcap(owner, name, config)
        case NullPort():
            from .null import Null

            return Null(owner, name, config)
        case InProcessPort():
            from .in_process import InProcess

            return InProcess(owner, name, config)


__all__ = ["Port", "PortOwner", "make_port"]
