"""Disks: our back-end beside QEMU's vhost-user-blk export, of the same kind, with the same driver and the same file.

    python -m bench.block                     a table: requests a second, and what each costs the back-end's process
    python -m bench.block --seconds 5 --rounds 6 --depth 64

The driver is a `viaduct.vhost_user.FrontEnd` in this process with one queue; it keeps `--depth` random reads of 4096
bytes in flight and checks each. The file lies in the page cache, so that the back-end is measured and not the disk.
The driver is in Python and may be the slower of the two: then the requests a second say little, and the processor time
of the back-end for each request says more. The two take turns; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from viaduct._core import DriverQueue, GuestMemory
from viaduct.vhost_user import FrontEnd
from viaduct.virtio import DeviceFeature, DeviceType

BLOCK = 4096
PLACE = 8192
"""Bytes for each request in flight: header and status, then a block."""
FEATURES = DeviceFeature.VERSION_1 | DeviceFeature.EVENT_IDX | DeviceFeature.INDIRECT_DESC
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Peer:
    """A program that serves a disk."""

    name: str
    command: tuple[str, ...]


def peers(image: Path, directory: Path) -> dict[Peer, Path]:
    """Both, and where each listens."""
    ours, theirs = directory / "viaduct.sock", directory / "qemu.sock"
    viaduct = str(Path(sys.executable).parent / "viaduct")
    disk = f"driver=file,node-name=file,filename={image},aio=io_uring,locking=off"
    export = f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={theirs},writable=off,num-queues=1"
    return {
        Peer("Viaduct", (viaduct, "device", "blk", str(image), "--read-only", "--socket", str(ours))): ours,
        Peer(
            "qemu-storage-daemon",
            (
                *("qemu-storage-daemon", "--blockdev", disk, "--blockdev", "driver=raw,node-name=disk,file=file"),
                *("--export", export),
            ),
        ): theirs,
    }


@contextmanager
def serving(peer: Peer, socket: Path) -> Iterator[int]:
    """Runs a peer until the end of the block; gives its process id."""
    process = subprocess.Popen(peer.command, stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            if process.poll() is not None:
                raise SystemExit(f"{peer.name} ended with status {process.returncode}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def measure(socket: Path, pid: int, blocks: int, seconds: float, depth: int) -> tuple[float, float]:
    """Requests a second, and microseconds of the back-end's processor time for each."""
    front_end = FrontEnd(
        str(socket), device_id=DeviceType.BLOCK, features=FEATURES, queue_count=1, memory_size=16 << 20
    )
    async with front_end as fe:
        queue, memory = fe.queues[0], GuestMemory().with_region(0, fe.memory_size, fe.user_base, 0, fe.memory_fd)
        driver = DriverQueue(
            memory,
            layout="split",
            size=queue.size,
            descriptor_addr=fe.user_base + queue.descriptor_addr,
            driver_addr=fe.user_base + queue.driver_addr,
            device_addr=fe.user_base + queue.device_addr,
            base=queue.base,
            event_idx=bool(fe.features & DeviceFeature.EVENT_IDX),
            tables=(fe.data_addr + depth * PLACE, 1 << 20),
        )
        chosen = random.Random(1)

        def ask(token: int) -> int:
            at, block = fe.data_addr + token * PLACE, chosen.randrange(blocks)
            memory.write(at, struct.pack("<IIQ", 0, 0, block * (BLOCK // 512)))
            assert driver.add([(at, 16)], [(at + BLOCK, BLOCK), (at + 16, 1)], token)
            return block

        asked = {token: ask(token) for token in range(depth)}
        driver.kick()
        os.eventfd_write(queue.kick_fd, 1)
        done, began, cpu = 0, time.perf_counter(), cpu_seconds(pid)
        while (elapsed := time.perf_counter() - began) < seconds:
            again = False
            while (taken := driver.take()) is not None:
                token = taken[0]
                place = fe.data_addr + token * PLACE
                if memory.read(place + 16, 1) != b"\0" or memory.read(place + BLOCK, 8) != struct.pack(
                    "<Q", asked[token]
                ):
                    raise SystemExit("a wrong answer")
                asked[token] = ask(token)
                done, again = done + 1, True
            if again and driver.kick():
                os.eventfd_write(queue.kick_fd, 1)
        return done / elapsed, 1e6 * (cpu_seconds(pid) - cpu) / max(done, 1)


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--mebibytes", type=int, default=256)
    options = parser.parse_args()
    blocks = options.mebibytes << 20 >> 12
    with tempfile.TemporaryDirectory(prefix="viaduct-bench-") as name:
        image = Path(name) / "disk.img"
        with image.open("wb") as file:
            for block in range(blocks):
                file.write(struct.pack("<Q", block).ljust(BLOCK, b"."))
        results: dict[str, list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for peer, socket in peers(image, Path(name)).items():
                with serving(peer, socket) as pid:
                    found = asyncio.run(measure(socket, pid, blocks, options.seconds, options.depth))
                results.setdefault(peer.name, []).append(found)
                socket.unlink(missing_ok=True)
    print(f"| 4 KiB random reads, {options.depth} in flight | requests a second | back-end CPU, us each |")
    print("| --- | --- | --- |")
    for name, rounds in results.items():
        rate, cost = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {name} | {rate:.0f} | {cost:.2f} |")


if __name__ == "__main__":
    main()
