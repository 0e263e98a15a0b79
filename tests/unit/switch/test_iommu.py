"""A port whose guest is behind an IOMMU: what is missing is asked for, what is not allowed is refused and counted.

The other end of the link has no IOMMU.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from switch.platform_guest import (
    ACCESS_FAIL,
    INVALIDATE,
    IOVA,
    MISS,
    PAGE,
    PAGES,
    READ,
    RECEIVE,
    SIZE,
    TRANSMIT,
    USER,
    WRITE,
    PlatformGuest,
    guest,
    until,
)
from viaduct.switch.config import build_config
from viaduct.switch.switch import Switch
from viaduct.vhost_user import iommu as iommu_module

BEHIND, PLAIN = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def ethernet(to: bytes, sender: bytes, text: str) -> bytes:
    return (to + sender + b"\x88\xb5" + text.encode()).ljust(60, b"\0")


class Link:
    """Two guests on two ports of a switch, one behind an IOMMU."""

    def __init__(self, switch: Switch, behind: PlatformGuest, plain: PlatformGuest) -> None:
        self.switch = switch
        self.behind = behind
        self.plain = plain

    def up(self, port: str) -> bool:
        return any(each.name == port and each.link == "up" for each in self.switch.ports())

    def drops(self, reason: str) -> int:
        (found,) = (each for each in self.switch.stats().ports if each.name == "behind")
        return found.drops().get(reason, 0)

    async def start(self) -> None:
        """Starts all rings; the plain guest can receive, and both addresses are known."""
        await self.behind.start()
        await self.plain.start()
        await until(lambda: self.up("behind") and self.up("plain"))
        for page in range(100, 100 + SIZE):
            self.plain.add(RECEIVE, self.plain.buffer(page), PAGE)
        await self.send_plain("hello")

    async def send_plain(self, text: str) -> None:
        """The plain guest sends a frame; returns when the switch is done with it."""
        length = self.plain.put(1, ethernet(BEHIND, PLAIN, text))
        sent = self.plain.add(TRANSMIT, self.plain.buffer(1), length)
        await until(lambda: self.plain.used(TRANSMIT) == sent)

    async def arrived(self, number: int, text: str) -> None:
        """Waits for the `number`th frame at the plain guest, counted from 0."""
        await until(lambda: self.plain.used(RECEIVE) > number)
        assert self.plain.frame(100 + number, 60) == ethernet(PLAIN, BEHIND, text)


@pytest.fixture
async def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Link]:
    # What is answered is never given up, however late this machine lets the answer come, and is reported once.
    monkeypatch.setattr(iommu_module, "PATIENCE", 3600.0)
    monkeypatch.setattr(iommu_module, "REPORT_INTERVAL", 3600.0)
    monkeypatch.setattr(iommu_module, "RETRY", 3600.0)
    ports = {name: f"vhost-user:{tmp_path}/{name}.sock" for name in ("behind", "plain")}
    async with (
        Switch(build_config({"ports": ports})) as switch,
        guest(f"{tmp_path}/behind.sock") as behind,
        guest(f"{tmp_path}/plain.sock", iommu=False) as plain,
    ):
        yield Link(switch, behind, plain)


async def transmit(link: Link, page: int, text: str, permissions: int = READ) -> int:
    """The guest behind the IOMMU sends a frame that lies in a page of its own."""
    length = link.behind.put(page, ethernet(PLAIN, BEHIND, text))
    return link.behind.add(TRANSMIT, link.behind.buffer(page, permissions), length)


async def test_rings_and_buffers_are_asked_for_and_frames_flow(link: Link) -> None:
    await link.start()
    await transmit(link, 5, "first")
    await link.arrived(0, "first")
    for page in (0, 1, 2, 4, 5, 6):
        assert link.behind.missed(IOVA + page * PAGE) >= 1, "a part of a ring"
    (asked,) = (asked for asked in link.behind.asked if asked.iova == IOVA + (64 + 5) * PAGE)
    assert (asked.permissions, asked.kind) == (READ, MISS)
    await transmit(link, 5, "second")
    await link.arrived(1, "second")
    assert link.behind.missed(IOVA + (64 + 5) * PAGE) == 1, "it is known by now"
    (port,) = (port for port in link.switch.ports() if port.name == "behind")
    assert "ACCESS_PLATFORM" in port.features
    assert port.iommu is not None
    assert port.iommu.updates >= 7
    assert port.iommu.ranges >= 2


async def test_frames_are_received_into_pages_that_may_be_written(link: Link) -> None:
    await link.start()
    for page in (10, 11, 12):
        link.behind.add(RECEIVE, link.behind.buffer(page, WRITE), PAGE)
    received = 0
    while received < 3:
        # A frame does not wait long for a translation; the next one finds it.
        await link.send_plain(f"frame {received}")
        received = link.behind.used(RECEIVE)
    for number in range(3):
        assert link.behind.written(number) == 12 + 60
        assert link.behind.frame(10 + number, 60)[:12] == BEHIND + PLAIN
    assert link.drops("iommu") == 0


async def test_a_buffer_that_may_only_be_read_receives_nothing(link: Link) -> None:
    await link.start()
    link.behind.add(RECEIVE, link.behind.buffer(10, READ), PAGE)
    link.behind.add(RECEIVE, link.behind.buffer(11, WRITE), PAGE)
    while not link.behind.used(RECEIVE):
        await link.send_plain("not to be seen")
    assert link.drops("iommu") == 1
    assert link.behind.written(0) == 0
    assert link.behind.memory[10 * PAGE : 11 * PAGE] == bytes(PAGE)
    await until(lambda: any(asked.kind == ACCESS_FAIL for asked in link.behind.asked))
    (failed,) = (asked for asked in link.behind.asked if asked.kind == ACCESS_FAIL)
    assert (failed.iova, failed.permissions) == (IOVA + (64 + 10) * PAGE, WRITE)
    while link.behind.used(RECEIVE) < 2:
        await link.send_plain("to be seen")
    assert link.behind.frame(11, 60) == ethernet(BEHIND, PLAIN, "to be seen")
    assert link.drops("iommu") == 1


async def test_a_buffer_that_may_only_be_written_is_not_sent(link: Link) -> None:
    await link.start()
    await transmit(link, 5, "secret", WRITE)
    sent = await transmit(link, 6, "open")
    await link.arrived(0, "open")
    await until(lambda: link.behind.used(TRANSMIT) == sent)
    assert link.drops("iommu") == 1


async def test_what_is_not_mapped_is_refused_at_once(link: Link) -> None:
    await link.start()
    link.behind.add(TRANSMIT, IOVA + 0x8000_0000, 72)
    sent = await transmit(link, 6, "mapped")
    await link.arrived(0, "mapped")
    await until(lambda: link.behind.used(TRANSMIT) == sent)
    assert link.drops("iommu") == 1
    # The very page may be mapped later, and nobody says so.
    link.behind.map(IOVA + 0x8000_0000, 7)
    length = link.behind.put(7, ethernet(PLAIN, BEHIND, "by now"))
    link.behind.add(TRANSMIT, IOVA + 0x8000_0000, length)
    await link.arrived(1, "by now")


async def test_a_miss_that_is_never_answered_is_given_up(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough for the front-end in this process to answer what it does answer, however busy the machine is.
    monkeypatch.setattr(iommu_module, "PATIENCE", 3.0)
    await link.start()
    await transmit(link, 6, "known")
    await link.arrived(0, "known")
    link.behind.answers = False
    link.behind.add(TRANSMIT, IOVA + 0x8000_0000, 72)
    sent = await transmit(link, 6, "behind it")
    await link.arrived(1, "behind it")
    await until(lambda: link.behind.used(TRANSMIT) == sent)
    assert link.drops("iommu") == 1


async def test_nothing_is_used_after_an_invalidation(link: Link) -> None:
    await link.start()
    await transmit(link, 5, "old")
    await link.arrived(0, "old")
    iova = IOVA + (64 + 5) * PAGE
    await link.behind.invalidate(iova)
    # The same address means another page now.
    length = link.behind.put(20, ethernet(PLAIN, BEHIND, "new"))
    link.behind.add(TRANSMIT, link.behind.map(iova, 20, READ), length)
    await link.arrived(1, "new")
    assert link.behind.missed(iova) == 2


async def test_buffers_that_were_looked_at_before_an_invalidation_are_looked_at_again(link: Link) -> None:
    await link.start()
    for page in (10, 11):
        link.behind.add(RECEIVE, link.behind.buffer(page, WRITE), PAGE)
    while not link.behind.used(RECEIVE):
        await link.send_plain("first")
    iova = IOVA + (64 + 11) * PAGE
    await until(lambda: link.behind.missed(iova))
    await link.behind.invalidate(iova)
    link.behind.map(iova, 30, WRITE)
    while link.behind.used(RECEIVE) < 2:
        await link.send_plain("second")
    assert link.behind.memory[11 * PAGE : 12 * PAGE] == bytes(PAGE)
    assert link.behind.frame(30, 60) == ethernet(BEHIND, PLAIN, "second")


@pytest.mark.parametrize("size", [0, 1 << 63])
async def test_rings_that_were_invalidated_are_asked_for_again_and_go_on(link: Link, size: int) -> None:
    await link.start()
    for number in range(5):
        await transmit(link, 5, f"frame {number}")
        await link.arrived(number, f"frame {number}")
        domain = dict(link.behind.domain)
        await link.behind.invalidate(0, size)
        link.behind.domain.update(domain)
    assert link.drops("iommu") == 0
    assert link.behind.used(TRANSMIT) == 5


async def test_rings_start_when_their_translations_have_come(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iommu_module, "PATIENCE", 0.05)
    link.behind.answers = False
    await link.behind.start()
    await until(lambda: link.behind.missed(IOVA))
    assert not link.up("behind")
    link.behind.answers = True
    # It was given up meanwhile; any news is a reason to look again.
    assert await link.behind.update(IOVA, PAGE, USER + (PAGES - 1) * PAGE, READ | WRITE) == 0
    await until(lambda: link.up("behind"))


@pytest.mark.parametrize("page", [0, 5, 6])
async def test_a_page_of_a_ring_that_was_refused_is_asked_for_again(
    link: Link, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(iommu_module, "RETRY", 0.05)
    await link.start()
    await transmit(link, 5, "before")
    await link.arrived(0, "before")
    iova = IOVA + page * PAGE
    mapped = link.behind.domain[iova]
    before = link.behind.missed(iova)
    await link.behind.invalidate(iova)
    await until(lambda: link.behind.missed(iova) > before + 1)
    # From here on nobody says anything by himself.
    link.behind.domain[iova] = mapped
    await transmit(link, 5, "after")
    link.behind.add(RECEIVE, link.behind.buffer(10), PAGE)
    await link.arrived(1, "after")
    while not link.behind.used(RECEIVE):
        await link.send_plain("and back")
    assert link.drops("iommu") == 0


async def test_what_was_known_is_forgotten_with_the_last_ring(link: Link) -> None:
    await link.start()
    await transmit(link, 5, "frame")
    await link.arrived(0, "frame")
    await link.behind.stop()
    (port,) = (port for port in link.switch.ports() if port.name == "behind")
    assert port.iommu is not None
    assert port.iommu.ranges == 0


async def test_a_flood_of_misses_is_bounded_and_harms_nobody_else(link: Link, tmp_path: Path) -> None:
    """Nobody answers; meanwhile two others on the same poller talk to each other."""
    await link.start()
    link.behind.answers = False
    before = len(link.behind.asked)
    chance = random.Random(8)
    for _ in range(SIZE):
        link.behind.add(TRANSMIT, chance.randrange(1 << 40) * PAGE, 72)
    await until(lambda: len(link.behind.asked) > before)
    await link.switch.add_port("other", f"vhost-user:{tmp_path}/other.sock")
    async with guest(f"{tmp_path}/other.sock", iommu=False) as other:
        await other.start()
        await until(lambda: link.up("other"))
        for number in range(20):
            length = other.put(1, ethernet(PLAIN, bytes.fromhex("020000000003"), f"frame {number}"))
            sent = other.add(TRANSMIT, other.buffer(1), length)
            await until(lambda sent=sent: other.used(TRANSMIT) == sent)  # type: ignore[misc]
        await until(lambda: link.plain.used(RECEIVE) >= 20)
    assert len(link.behind.asked) - before <= 256
    assert link.behind.used(TRANSMIT) == 0, "they wait for an answer"
    assert await link.behind.message(INVALIDATE) == 0, "the socket is served"


@pytest.mark.parametrize(
    ("iova", "size", "user", "permissions"),
    [
        (0, 0, USER, 3),
        ((1 << 64) - PAGE, 2 * PAGE, USER, 3),
        (0, PAGE, USER, 0),
        (0, PAGE, USER, 4),
        (0, PAGE, USER + PAGES * PAGE, 3),
        (0, PAGE, 0, 3),
    ],
    ids=["empty", "beyond the end", "no permissions", "unknown permissions", "behind the memory", "no memory"],
)
async def test_translations_that_cannot_be_are_refused(
    link: Link, iova: int, size: int, user: int, permissions: int
) -> None:
    assert await link.behind.update(iova, size, user, permissions) == 1
    assert await link.behind.update(0, PAGE, USER, 3) == 0, "the session goes on"


@pytest.mark.parametrize("kind", [0, MISS, ACCESS_FAIL, 5, 255])
async def test_only_updates_and_invalidations_come_from_a_front_end(link: Link, kind: int) -> None:
    assert await link.behind.message(kind) == 1
    assert await link.behind.message(INVALIDATE) == 0
