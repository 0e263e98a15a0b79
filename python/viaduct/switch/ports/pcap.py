"""Capture files as a port."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from viaduct.switch.config import ConfigError, PcapPort
from viaduct.switch.handover_format import PortData, PortPosition

from .port import Port

if TYPE_CHECKING:
    from viaduct.vhost_user.handover import Fds


class Pcap(Port):
    """Replays one file into the switch as soon as another port is up, and records what is sent to it in another."""

    config: PcapPort

    async def _start(self) -> None:
        self._replay()
        self._record()

    def save(self, fds: Fds) -> PortData:
        return PortData(name=self.name, broken=self.broken, replayed=self.data_path.replayed(self.number))

    async def _adopt(self, data: PortData, fds: Fds) -> None:
        # Reading what has been replayed may take long, so as much as possible is done while the other process goes on.
        self._replay(data.replayed)

    def resume(self, position: PortPosition) -> None:
        self.data_path.skip_replay(self.number, position.replayed)
        self._record(begun=True)

    def _replay(self, skip: int = 0) -> None:
        if self.config.file is None:
            return
        try:
            with open(self.config.file, "rb", opener=_at_once) as file:
                self.data_path.attach_replay(self.number, file.fileno(), skip)
        except OSError as error:
            raise ConfigError(f"cannot read {self.config.file!r}: {error.strerror}", ("file",)) from None
        except ValueError as error:
            raise ConfigError(f"{self.config.file!r}: {error}", ("file",)) from None

    def _record(self, begun: bool = False) -> None:
        if self.config.out is None:
            self.data_path.attach_null(self.number)
            return
        try:
            with open(self.config.out, "ab" if begun else "wb", opener=_at_once) as file:
                self.data_path.attach_record(self.number, file.fileno(), begun and file.tell() > 0)
        except OSError as error:
            raise ConfigError(f"cannot write {self.config.out!r}: {error.strerror}", ("out",)) from None
        except ValueError as error:
            raise ConfigError(f"{self.config.out!r}: {error}", ("out",)) from None


def _at_once(path: str, flags: int) -> int:
    """Opens without waiting for the other end of a pipe, which is refused then: it would hold up everybody."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
