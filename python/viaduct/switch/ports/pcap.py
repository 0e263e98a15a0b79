"""Capture files as a port."""

from __future__ import annotations

from viaduct.switch.config import ConfigError, PcapPort

from .port import Port


class Pcap(Port):
    """Replays one file into the switch as soon as another port is up, and records what is sent to it in another."""

    config: PcapPort

    async def _start(self) -> None:
        self._open_files()

    def _open_files(self) -> None:
        if self.config.file is not None:
            try:
                with open(self.config.file, "rb") as file:
                    self.data_path.attach_replay(self.number, file.fileno())
            except OSError as error:
                raise ConfigError(f"cannot read {self.config.file!r}: {error.strerror}", ("file",)) from None
            except ValueError as error:
                raise ConfigError(f"{self.config.file!r}: {error}", ("file",)) from None
        if self.config.out is None:
            self.data_path.attach_null(self.number)
            return
        try:
            with open(self.config.out, "wb") as file:
                self.data_path.attach_record(self.number, file.fileno())
        except OSError as error:
            raise ConfigError(f"cannot write {self.config.out!r}: {error.strerror}", ("out",)) from None
