"""The configuration space of a network device (virtio 1.2, 5.1.4)."""

import pytest

from viaduct.virtio.net_config import ANNOUNCE, LINK_UP, NetConfig

CONFIG = NetConfig(bytes.fromhex("525400123456"), LINK_UP | ANNOUNCE, 4, 9000, 10000, 1)
BYTES = bytes.fromhex("525400123456 0300 0400 2823 10270000 01")


def test_bytes() -> None:
    assert CONFIG.pack() == BYTES
    assert NetConfig.unpack(BYTES) == CONFIG
    assert CONFIG.mac_text == "52:54:00:12:34:56"


@pytest.mark.parametrize("length", range(len(BYTES) + 1))
def test_fields_that_are_not_there_keep_their_defaults(length: int) -> None:
    config = NetConfig.unpack(BYTES[:length])
    expected = CONFIG.pack()[:length] + NetConfig().pack()[length:]
    assert config.pack() == expected


def test_what_follows_is_ignored() -> None:
    assert NetConfig.unpack(BYTES + b"rss") == CONFIG
