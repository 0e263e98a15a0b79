"""Inverting a feature bit gives every other bit: Python 3.11.2, which Debian 12 has, gives only those below it."""

from __future__ import annotations

import pytest

from viaduct.vhost_user import ProtocolFeature
from viaduct.virtio.features import DeviceFeature, NetFeature


@pytest.mark.parametrize("bit", [DeviceFeature.LOG_ALL, NetFeature.MAC, ProtocolFeature.REPLY_ACK], ids=repr)
def test_all_other_bits_stay(bit: DeviceFeature | NetFeature | ProtocolFeature) -> None:
    everything = (1 << 64) - 1
    assert everything & ~bit == everything ^ int(bit)
    assert (everything & ~bit) | bit == everything
