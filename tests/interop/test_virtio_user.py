"""DPDK's virtio-user driver on each of its ring paths, with every frame's content verified.

Two DPDK processes are two stations on the switch: `frame_checker` sends, testpmd swaps the addresses and sends back.
The checker compares what returns, byte by byte, and counts on order; a whole window of frames has to wait in the
rings until testpmd begins. Each path is tried at testpmd's end and, against a path of the other layout, at the
checker's end.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop.back_end import BackEnd, PortSpec
from interop.peer_process import PeerProcess, require
from interop.testpmd import Testpmd, eal_arguments

HERE = Path(__file__).parent
STATION, CHECKER = "02:00:00:00:00:0b", "02:00:00:00:00:0a"
FRAMES = 20_000
RING = 256
EAL = ("--force-max-simd-bitwidth=512",)
LOG = ("--log-level=pmd.net.virtio.init:debug",)
# testpmd throws away what waits in the receive rings when it begins to forward, unless told otherwise.
OPTIONS = ("--no-flush-rx", "--tx-offloads=0x8000", f"--rxd={RING}", f"--txd={RING}")
JUMBO = 9000
JUMBO_OPTIONS = (f"--max-pkt-len={JUMBO}", "--enable-scatter")
CPU_FLAGS = {"avx512f", "avx512bw", "avx512vl"}  # what the vectorized packed path needs


@dataclass(frozen=True)
class RingPath:
    """One of the driver's code paths: the options that select it, and what the driver logs when it has taken it."""

    layout: str
    mergeable: bool
    in_order: bool
    vectorized: bool
    log: str

    def device(self, socket: Path, mac: str, server: bool = False, queue_pairs: int = 1) -> str:
        """The virtio-user device with this path."""
        options = {
            "path": socket,
            "mac": mac,
            "queue_size": RING,
            "queues": queue_pairs,
            "server": int(server),
            "packed_vq": int(self.layout == "packed"),
            "mrg_rxbuf": int(self.mergeable),
            "in_order": int(self.in_order),
            "vectorized": int(self.vectorized),
        }
        return "net_virtio_user0," + ",".join(f"{name}={value}" for name, value in options.items())

    def __str__(self) -> str:
        kinds = ("mergeable" if self.mergeable else "plain", "in_order" if self.in_order else "")
        return "-".join(filter(None, (self.layout, *kinds, "vectorized" if self.vectorized else "")))


# The driver has a vectorized split path only without in-order, and a vectorized packed path only with it.
PATHS = (
    RingPath("split", True, False, False, "using mergeable buffer Rx path"),
    RingPath("split", True, True, False, "using inorder Rx path"),
    RingPath("split", False, False, False, "using standard Rx path"),
    RingPath("split", False, True, False, "using inorder Rx path"),
    RingPath("split", False, False, True, "using vectorized Rx path"),
    RingPath("packed", True, False, False, "using packed ring mergeable buffer Rx path"),
    RingPath("packed", True, True, False, "using packed ring mergeable buffer Rx path"),
    RingPath("packed", False, False, False, "using packed ring standard Rx path"),
    RingPath("packed", False, True, False, "using packed ring standard Rx path"),
    RingPath("packed", False, True, True, "using packed ring vectorized Rx path"),
)


@pytest.fixture(scope="module")
def frame_checker(module_directory: Path) -> Path:
    """The checker, compiled with the machine's DPDK."""
    program = module_directory / "frame_checker"
    flags = subprocess.run(
        [require("pkg-config", "pkg-config"), "--cflags", "--libs", "libdpdk"], capture_output=True, text=True
    )
    if flags.returncode:
        pytest.fail("DPDK's headers are missing, and this test needs them: apt-get install libdpdk-dev")
    command = [require("gcc", "gcc"), "-O2", "-o", str(program), str(HERE / "frame_checker.c"), *flags.stdout.split()]
    subprocess.run(command, check=True, capture_output=True)
    return program


def station(directory: Path, port: PortSpec, path: RingPath, jumbo: bool = False, queue_pairs: int = 1) -> Testpmd:
    """A testpmd that returns all frames, its driver on `path`; it listens if the back-end is a client at this port."""
    options = [*OPTIONS, *(JUMBO_OPTIONS if jumbo else ()), f"--rxq={queue_pairs}", f"--txq={queue_pairs}"]
    device = path.device(port.socket, STATION, port.client, queue_pairs)
    return Testpmd("station", directory, [device], "macswap", [*EAL, *LOG], options)


def exchange(
    checker: Path,
    directory: Path,
    port: PortSpec,
    path: RingPath,
    returns: Testpmd,
    other: RingPath,
    jumbo: bool = False,
) -> None:
    """Send FRAMES frames from the checker, its driver on `path`, to a station on the path `other`; all must return."""
    # A frame may take five buffers of the receive ring. Without in-order, the packed driver of DPDK 22.11 forgets a
    # descriptor's buffer id after chains of several ring entries (9 segments and more), so none are made there.
    window = RING // 5 if jumbo else RING * 3 // 4
    segments = 6 if any(p.layout == "packed" and not p.in_order for p in (path, other)) else 30
    words = (STATION, FRAMES, JUMBO if jumbo else 1514, window, segments)
    device = path.device(port.socket, CHECKER, port.client)
    command: list[str | Path] = [checker, *eal_arguments(), "--file-prefix=checker", *EAL, "--vdev", device, "--"]
    command += map(str, words)
    log = directory / "checker.log"
    log.unlink(missing_ok=True)
    returns.ask("stop")
    with PeerProcess("checker", command, log, {"RUNTIME_DIRECTORY": str(directory)}) as process:
        process.wait_for_output("window sent")
        returns.ask("start")
        process.wait_for_output("RESULT:", seconds=120)
        assert f"RESULT: {FRAMES} sent, {FRAMES} back, all right" in process.output()
        process.wait_for(lambda: not process.running(), "its end")
        assert process.process.returncode == 0


@pytest.mark.parametrize("number", range(len(PATHS)), ids=lambda number: str(PATHS[number]))
def test_every_frame_returns_unchanged(
    number: int,
    frame_checker: Path,
    directory: Path,
    make_back_end: Callable[[Path, Sequence[PortSpec]], BackEnd],
) -> None:
    path, checker_path = PATHS[number], PATHS[(number + len(PATHS) // 2) % len(PATHS)]
    if path.vectorized and CPU_FLAGS - set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("the driver's vectorized packed path needs AVX-512, which this CPU does not have")
    # Now and then the driver listens and the back-end connects.
    here = PortSpec("checker", directory / "checker.sock")
    there = PortSpec("station", directory / "station.sock", client=number % 3 == 2)
    jumbo = path.mergeable and checker_path.mergeable
    returns = station(directory, there, path, jumbo)
    with running(make_back_end(directory, [here, there]), returns):
        exchange(frame_checker, directory, here, checker_path, returns, path, jumbo)
        assert path.log in returns.running_process().output()


@pytest.mark.parametrize("path", [PATHS[0], PATHS[6]], ids=str)
def test_two_queue_pairs(
    path: RingPath,
    frame_checker: Path,
    directory: Path,
    make_back_end: Callable[[Path, Sequence[PortSpec]], BackEnd],
    viaduct_only: None,
) -> None:
    here = PortSpec("checker", directory / "checker.sock")
    there = PortSpec("station", directory / "station.sock", queue_pairs=2)
    returns = station(directory, there, path, jumbo=True, queue_pairs=2)
    with running(make_back_end(directory, [here, there]), returns):
        exchange(frame_checker, directory, here, PATHS[0], returns, path, jumbo=True)


@pytest.mark.parametrize("path", [PATHS[0], PATHS[4], PATHS[5], PATHS[8]], ids=str)
def test_listening_driver_outlives_the_back_end(
    path: RingPath,
    frame_checker: Path,
    directory: Path,
    make_back_end: Callable[[Path, Sequence[PortSpec]], BackEnd],
) -> None:
    """Frames pass before the back-end is killed and after it was started again; testpmd stays."""
    here = PortSpec("checker", directory / "checker.sock")
    there = PortSpec("station", directory / "station.sock", client=True)
    returns = station(directory, there, path)
    back_end = make_back_end(directory, [here, there])
    with running(back_end, returns):
        exchange(frame_checker, directory, here, PATHS[0], returns, path)
        back_end.kill()
        returns.wait_link(up=False)
        back_end.start()
        returns.wait_link()
        exchange(frame_checker, directory, here, PATHS[0], returns, path)


@contextmanager
def running(back_end: BackEnd, returns: Testpmd) -> Iterator[None]:
    """Both, from start to end."""
    try:
        back_end.start()
        returns.start()
        yield
        returns.stop()
        back_end.stop()
    finally:
        returns.kill()
        back_end.kill()
