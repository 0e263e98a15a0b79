"""A QEMU guest moves from one host to another and back while a TCP stream runs each way and a peer pings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from interop.guest_image import GuestImage
from interop.migration import MENDED_MOST, PEER, Site, migration_site


@pytest.fixture(params=["split", "packed"])
def site(request: pytest.FixtureRequest, directory: Path, image: GuestImage, viaduct_only: None) -> Iterator[Site]:
    with migration_site(directory, image, packed=request.param == "packed") as site:
        yield site


def test_there_and_back_under_traffic(site: Site) -> None:
    """No byte of the streams is wrong, no connection breaks, and the switches learn where the guest is now."""
    home = site.hosts[0]
    with site.watched():
        site.turn_back()
    mended = []
    for known_at_home in ("uplink", "guest"):
        with site.watched() as findings:
            journey = site.migrate()
            # The announcement was heard across the cable.
            site.wait_known(home, known_at_home)
        print(f"to host {site.hosts[site.here].name}: {journey}; {findings}")
        assert 0 < findings.answered <= findings.sent
        mended.append(journey.mended)
    assert min(mended) <= MENDED_MOST, f"pages that were not copied: {mended}; does the switch log what it writes?"
    assert site.guest.checksum_errors() == 0
    # The rings have all their buffers: more frames than they have descriptors pass.
    site.guest.ping(PEER, count=600)
