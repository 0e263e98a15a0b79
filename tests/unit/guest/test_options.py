"""What cannot work is refused with what to do about it, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from viaduct.guest import Guest, GuestError, LinkOptions, Receiver, Sender
from viaduct.guest.mac import mac_text, parse_mac
from viaduct.virtio.features import DeviceFeature, NetFeature


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ip": "10.0.0.1"}, "write 10.0.0.1/24 or fd00::1/64"),
        ({"ip": "10.0.0.300/24"}, "no address with its prefix length"),
        ({"mac": "02:00:00"}, "is no MAC address"),
        ({"mac": "03:00:00:00:00:01"}, "its first byte must be even"),
        ({"mac": "00:00:00:00:00:00"}, "no address for an interface"),
        ({"ring": "circular"}, "must be split or packed"),
        ({"queue_size": 100}, "power of two up to 32768"),
        ({"queue_size": 65536, "ring": "packed"}, "1 to 32768"),
        ({"queues": 0}, "1 to 128"),
        ({"mtu": 70000}, "68 to 65521"),
        ({"rings": "packed"}, "has no option 'rings'; it has listen, ring"),
        ({"options": LinkOptions(), "ring": "packed"}, "either `options` or its fields"),
    ],
)
def test_a_guest_that_cannot_work_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(GuestError, match=text):
        Guest("/tmp/x.sock", **arguments)


async def test_what_only_the_stack_knows_is_refused_at_the_start() -> None:
    with pytest.raises(GuestError, match="MTU 1000 is not allowed"):
        await Guest("/tmp/x.sock", ip="fd00::1/64", mtu=1000).start()
    with pytest.raises(GuestError, match="several gateways"):
        await Guest("/tmp/x.sock", ip="10.0.0.1/24", gateway=("10.0.0.3", "10.0.0.4")).start()


async def test_a_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    with pytest.raises(
        GuestError, match=rf"nobody listens there after 0.1 s; .*viaduct switch --port a=vhost-user:{path}"
    ):
        await Guest(path, ip="10.0.0.1/24", connect_timeout=0.1).start()
    with pytest.raises(GuestError, match=r"no back-end connected in 0.1 s; .*,client"):
        await Guest(path, ip="10.0.0.1/24", connect_timeout=0.1, listen=True).start()
    with pytest.raises(GuestError, match="nobody listens"):
        async with Receiver(path, connect_timeout=0.1):
            pass
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 63}, "frames of 63 bytes are not possible: 64 to 1514 bytes"),
        ({"size": 1515}, "64 to 1514"),
        ({"rate": 0.0}, "the rate must be greater than 0"),
    ],
)
async def test_impossible_frames_are_refused(arguments: dict[str, Any], text: str) -> None:
    async with Sender("/tmp/x.sock", **arguments) as sender:
        with pytest.raises(GuestError, match=text):
            await sender.run(count=1)


def test_impossible_numbers_of_things_are_refused() -> None:
    with pytest.raises(GuestError, match="flows 0 is not possible: 1 to 65535"):
        Sender("/tmp/x.sock", flows=0)
    with pytest.raises(GuestError, match="macs 70000 is not possible"):
        Receiver("/tmp/x.sock", macs=70000)


def test_options_become_features() -> None:
    assert LinkOptions().features() & (NetFeature.MRG_RXBUF | DeviceFeature.EVENT_IDX | DeviceFeature.VERSION_1)
    plain = LinkOptions(mergeable=False, event_idx=False, checksum=False)
    assert plain.features() == DeviceFeature.VERSION_1
    packed = LinkOptions(ring="packed")
    assert packed.required() == DeviceFeature.VERSION_1 | DeviceFeature.RING_PACKED
    assert not LinkOptions(segmentation=False).features() & NetFeature.HOST_TSO4
    # Segmentation needs checksums (virtio 1.2, 5.1.3.1).
    assert not plain.features() & NetFeature.GUEST_TSO4


def test_mac_addresses() -> None:
    assert mac_text(parse_mac("02-00-0A-00-00-01")) == "02:00:0a:00:00:01"
    assert parse_mac("ff:ff:ff:ff:ff:ff", group=True) == b"\xff" * 6
    assert Guest("/tmp/x.sock", ip=("fd00::1/64", "10.0.0.1/24")).mac == b"\x02\x00\x0a\x00\x00\x01"
    first, second = (Guest("/tmp/x.sock", ip="fd00::1/64").mac for _ in range(2))
    assert first != second
    assert first[0] == 2
