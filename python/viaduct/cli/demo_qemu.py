"""The demonstration with two Linux machines in QEMU."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from viaduct import Switch
from viaduct.qemu.linux_image import LinuxImage, linux_image
from viaduct.qemu.linux_kernel import LinuxImageError
from viaduct.qemu.machine import Machine, MachineError
from viaduct.switch.status import Statistics

from .demo_stage import Stage
from .failure import FAILED, Failure

ALICE, BOB = "10.0.0.1", "10.0.0.2"
FILE_SIZE = 64 << 20
_HOW = {"kvm": "with KVM", "tcg": "by emulation, which is slow: there is no KVM here that works"}
PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
"""What has to be there, and the Debian package that has it."""


class Report(msgspec.Struct, kw_only=True):
    """What `--json` prints. Times in seconds, round trips in milliseconds as the guest's ping says."""

    boot: float
    kernel: str
    accelerator: str
    ping_sent: int
    ping_received: int
    ping_average_ms: float
    fetched_bytes: int
    fetched_seconds: float
    statistics: Statistics
    passed: bool


async def show(seconds: float, json: bool) -> bool:
    """Run the demonstration and print it. Returns whether everything that was sent arrived."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        raise Failure(f"--qemu needs the Debian packages: apt-get install {' '.join(missing)}", FAILED)
    try:
        report = await _run(seconds, json)
    except (LinuxImageError, MachineError) as error:
        raise Failure(str(error), FAILED) from error
    if json:
        from .output import print_json

        print_json(report)
    return report.passed


async def _run(seconds: float, quiet: bool) -> Report:
    with tempfile.TemporaryDirectory(prefix="viaduct-demo-") as name:
        directory = Path(name)
        sockets = {guest: directory / f"{guest}.sock" for guest in ("alice", "bob")}
        async with Switch() as switch:
            for guest, path in sockets.items():
                await switch.add_port(guest, f"vhost-user:{path}")
            stage = Stage(switch, quiet)
            stage.say("Two Linux machines, one switch, a vhost-user socket for each. Getting a kernel for them ...")
            image: LinuxImage = await asyncio.to_thread(linux_image)
            stage.say(f"Booting Linux {image.version}, twice ...")
            began = time.monotonic()
            machines = [
                Machine(guest, image, directory, path, f"52:54:00:00:00:0{number}")
                for number, (guest, path) in enumerate(sockets.items(), 1)
            ]
            async with _all_running(machines):
                alice, bob = machines
                boot = time.monotonic() - began
                stage.say(f"Both are up after {boot:.1f} s, {_HOW[alice.accelerator]}.")
                for machine, address in ((alice, ALICE), (bob, BOB)):
                    await machine.run(f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
                sent, received, average = await _ping(alice)
                stage.say(f"Ping alice to bob: {received} of {sent} answered, average {average:.2f} ms")
                async with stage.table():
                    size, elapsed, right = await _fetch(alice, bob, seconds)
                checked = "checksum right" if right else "CHECKSUM WRONG"
                stage.say(f"TCP alice to bob: {size * 8 / elapsed / 1e9:.2f} Gbit/s over HTTP, {checked}")
                statistics = switch.stats()
    return Report(
        boot=boot,
        kernel=image.version,
        accelerator=alice.accelerator,
        ping_sent=sent,
        ping_received=received,
        ping_average_ms=average,
        fetched_bytes=size,
        fetched_seconds=elapsed,
        statistics=statistics,
        passed=received == sent and right,
    )


@asynccontextmanager
async def _all_running(machines: list[Machine]) -> AsyncIterator[list[Machine]]:
    """Starts machines side by side and ends all of them, whatever happens to one."""
    try:
        async with asyncio.TaskGroup() as starting:
            for machine in machines:
                starting.create_task(machine.start())
        yield machines
    except* MachineError as errors:
        raise errors.exceptions[0] from None
    finally:
        await asyncio.gather(*(machine.close() for machine in machines))


async def _ping(machine: Machine) -> tuple[int, int, float]:
    """Requests sent, answers received, average round trip in milliseconds."""
    text = await machine.run(f"ping -c 1 -w 20 {BOB} >/dev/null; ping -c 20 -A -w 20 {BOB} || true")
    counts = re.search(r"(\d+) packets transmitted, (\d+) packets received", text)
    times = re.search(r"= [\d.]+/([\d.]+)/", text)
    if counts is None:
        raise MachineError(f"{machine.name}: not what a ping says: {text.strip()}")
    return int(counts[1]), int(counts[2]), float(times[1]) if times else 0.0


async def _fetch(server: Machine, client: Machine, seconds: float) -> tuple[int, float, bool]:
    """Bytes that came over TCP in at least so many seconds, the time it took, and whether the last file was right."""
    prepared = f"head -c {FILE_SIZE} /dev/urandom >/tmp/data; httpd -p 80 -h /tmp; md5sum </tmp/data"
    wanted = await server.run(prepared)
    text = await client.run(_FETCH.format(seconds=int(seconds), url=f"http://{ALICE}/data"), seconds + 120)
    rounds, began, ended, found = text.split(maxsplit=3)
    return int(rounds) * FILE_SIZE, float(ended) - float(began), found == wanted


_FETCH = """
now() {{ cut -d' ' -f1 /proc/uptime; }}
began=$(now)
end=$((${{began%.*}} + {seconds}))
rounds=0
while [ $rounds = 0 ] || [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do
    wget -q -O /tmp/got {url} || exit 1
    rounds=$((rounds + 1))
done
echo $rounds $began $(now)
md5sum </tmp/got
"""
