"""Feature bits: against the kernel's headers where they are installed, and as text for error messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from viaduct.virtio import DeviceFeature, DeviceType, NetFeature, describe_features
from viaduct.virtio.features import Feature

# What the headers of Linux call differently, or do not have.
RENAMED = {"ACCESS_PLATFORM": "IOMMU_PLATFORM"}


def test_combinations_are_plain_numbers() -> None:
    assert DeviceFeature.VERSION_1 | NetFeature.MAC == 1 << 32 | 1 << 5


@pytest.mark.parametrize("kind", [DeviceFeature, NetFeature])
def test_every_bit_has_one_meaning_and_a_section(kind: type[Feature]) -> None:
    for feature in kind:
        assert feature.bit_count() == 1
        assert re.match(r"virtio 1\.[23], [56]|virtio 1\.2, 2|vhost-user, \"", feature.section)
    assert not set(DeviceFeature) & set(NetFeature)


def test_own_bits_lie_where_the_specification_allows_them() -> None:
    """virtio 1.2, 2.2: 0 to 23 and 50 to 127 belong to the device type."""
    for feature in NetFeature:
        assert not 24 <= feature.bit_length() - 1 < 50
    for shared in DeviceFeature:
        assert 24 <= shared.bit_length() - 1 < 50


def test_text() -> None:
    features = NetFeature.MAC | NetFeature.MRG_RXBUF | DeviceFeature.VERSION_1 | 1 << 49
    assert describe_features(features, DeviceType.NET) == "MAC, MRG_RXBUF, VERSION_1, bit 49"
    assert describe_features(features, DeviceType.ENTROPY) == "bit 5, bit 15, VERSION_1, bit 49"
    assert describe_features(0) == "none"


def header_bits(header: str, prefix: str) -> dict[str, int]:
    text = Path("/usr/include/linux", header).read_text()
    return {name: int(bit) for name, bit in re.findall(rf"#define {prefix}(\w+)\s+(\d+)\b", text)}


@pytest.mark.skipif(not Path("/usr/include/linux/virtio_net.h").exists(), reason="no kernel headers to compare with")
def test_against_the_headers_of_linux() -> None:
    for kind, header, prefix in (
        (NetFeature, "virtio_net.h", "VIRTIO_NET_F_"),
        (DeviceFeature, "virtio_config.h", "VIRTIO_F_"),
    ):
        bits = header_bits(header, prefix)
        compared = 0
        for feature in kind:
            name = RENAMED.get(str(feature.name), str(feature.name))
            if name in bits:
                assert feature == 1 << bits[name], feature.name
                compared += 1
        assert compared >= 7
