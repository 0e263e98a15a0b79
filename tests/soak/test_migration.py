"""A QEMU guest migrates back and forth between two hosts, with a TCP stream each way and pings."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from interop.guest_image import GuestImage
from interop.migration import MENDED_MOST, migration_site

from soak.conftest import Soak

LONGEST_GAP_S = 1.0


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_streams_survive_each_migration(directory: Path, image: GuestImage, soak: Soak, ring: str) -> None:
    """All streams arrive right each time, and pings are answered again within a second."""
    gaps, mended = [], []
    with migration_site(directory, image, packed=ring == "packed") as site:
        for _ in soak.rounds(2, 20):
            with site.watched() as findings:
                journey = site.migrate()
                site.wait_known(site.hosts[0], "uplink" if site.here else "guest")
            soak.say(f"{journey}; {findings}")
            gaps.append(findings.gap)
            mended.append(journey.mended)
        assert site.guest.checksum_errors() == 0
    soak.measured("longest gap between answers to pings", max(gaps), "s", limit=LONGEST_GAP_S)
    soak.measured("pages mended, median", statistics.median(mended), limit=MENDED_MOST)
