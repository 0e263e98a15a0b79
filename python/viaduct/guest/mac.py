"""MAC addresses as text."""

from __future__ import annotations

from viaduct.guest.errors import GuestError


def parse_mac(text: str, group: bool = False) -> bytes:
    """Six bytes from ``02:00:00:00:00:01``. Raises `GuestError` if it is no address of one interface, or with `group`
    of one or several."""
    parts = text.replace("-", ":").split(":")
    try:
        address = bytes(int(part, 16) for part in parts if len(part) == 2)
    except ValueError:
        address = b""
    if len(parts) != 6 or len(address) != 6:
        raise GuestError(f"{text!r} is no MAC address; write six bytes as in 02:00:00:00:00:01")
    if (address[0] & 1 and not group) or not any(address):
        raise GuestError(f"{text} is no address for an interface: its first byte must be even, as in 02:00:00:00:00:01")
    return address


def mac_text(address: bytes) -> str:
    """``02:00:00:00:00:01``."""
    return address.hex(":")
