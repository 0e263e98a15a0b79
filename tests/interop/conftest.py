"""Fixtures of the interoperability tests: directories for sockets and logs, the guests' image, the back-end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest

from interop.back_end import BackEnd, PortSpec
from interop.guest_image import GuestImage, GuestImageError, device_guest_image, guest_image
from interop.ovs import OpenVswitch
from interop.peer_process import TAIL
from interop.testpmd import TestpmdBackEnd
from interop.viaduct_switch import ViaductSwitch

HERE = Path(__file__).parent
SECONDS = (
    300  # for one test and the fixtures that it starts; a guest boots in 2 s, or in 20 s where others work as well
)
BACK_ENDS = ("viaduct", "testpmd")

_directories: list[Path] = []


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker that selects these tests."""
    config.addinivalue_line("markers", "interop: needs peers that nobody here wrote: QEMU, DPDK, Open vSwitch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.interop)
            item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of all peers' logs with a failure."""
    report = yield
    if report.failed:
        for directory in _directories:
            for log in sorted([*directory.rglob("*.log"), *directory.rglob("*.console")]):
                if text := log.read_text(errors="replace")[-TAIL:].strip():
                    report.sections.append((f"{log.relative_to(directory)}", text))
    return report


def _scratch() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="viaduct-"))
    _directories.append(path)
    yield path
    _directories.remove(path)
    shutil.rmtree(path)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for the sockets and logs of one test; its path is short, as those of UNIX sockets must be."""
    yield from _scratch()


@pytest.fixture(scope="module")
def module_directory() -> Iterator[Path]:
    """A directory like `directory` for peers that serve all tests of a module."""
    yield from _scratch()


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """The kernel and initramfs of the guests; fails with what to install where they cannot be made."""
    try:
        return guest_image()
    except GuestImageError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def device_image() -> GuestImage:
    """The same with the drivers of disks, consoles, sockets, balloons and filesystems."""
    try:
        return device_guest_image()
    except GuestImageError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def back_end_kind() -> str:
    """Which back-end is under test: $VIADUCT_INTEROP_BACK_END, by default our switch."""
    kind = os.environ.get("VIADUCT_INTEROP_BACK_END", "viaduct")
    if kind not in BACK_ENDS:
        pytest.fail(f"VIADUCT_INTEROP_BACK_END is {kind!r}; it may be one of {', '.join(BACK_ENDS)}")
    return kind


@pytest.fixture(scope="session")
def make_back_end(back_end_kind: str) -> Callable[[Path, Sequence[PortSpec]], BackEnd]:
    """Make (not start) the back-end under test, given a directory for its logs, and its ports."""

    def make(directory: Path, ports: Sequence[PortSpec]) -> BackEnd:
        return ViaductSwitch(directory, ports) if back_end_kind == "viaduct" else TestpmdBackEnd(directory, ports)

    return make


@pytest.fixture(scope="session")
def viaduct_only(back_end_kind: str) -> None:
    """For tests of what only a switch does: nothing to test where testpmd stands in for it."""
    if back_end_kind != "viaduct":
        pytest.skip(f"{back_end_kind} was chosen as the back-end, and it is no switch")


@pytest.fixture
def testpmd_sockets(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Two sockets on which testpmd's net_vhost listens; each frame that enters one leaves by the other."""
    sockets = (directory / "pmd0.sock", directory / "pmd1.sock")
    back_end = TestpmdBackEnd(directory, [PortSpec(path.stem, path) for path in sockets])
    back_end.start()
    yield sockets
    back_end.stop()


@pytest.fixture
def ovs_sockets(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Two sockets of a learning Open vSwitch bridge with DPDK: it listens on the first and connects to the second."""
    listening, connecting = directory / "run" / "ovs0.sock", directory / "ovs1.sock"
    ports = [PortSpec("ovs0", listening), PortSpec("ovs1", connecting, client=True)]
    with OpenVswitch(directory, ports):
        yield listening, connecting
