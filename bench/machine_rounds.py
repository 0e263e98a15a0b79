"""What a virtual machine costs, measured in the lab: ours and QEMU's microvm in turn, with the same kernel and initrd.

`python -m bench.machine_rounds [--rounds N] [--measures A,B]`, run in the lab by bench.machine, prints one line of JSON
for each turn. What is measured, and what the two have in common, stands in docs/performance.md.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from interop.peer_process import PeerError
from lab.guest import BOOT, QUICK, Guest

from bench.machine_accounts import exits, own_memory

MEMORY = 256 << 20
PATIENCE = 60.0
"""Seconds for a boot or a script. The lab's emulated processor sometimes leaves a guest in a loop of page faults,
whoever runs it; such a turn is told and left out."""
TAP = "bench0"
HOST, GUEST = "10.9.0.1", "10.9.0.2"
MAC = "52:54:00:00:09:02"
PORT = 5009
STREAM_MIB = 32
FIO_S = 5
DEPTH = 8
DISK = 64 << 20
ROOT = "/dev/vda"
"""The lab's own root, which guests borrow for the programs on it."""
MONITORS = ("viaduct", "qemu")
COUNTED = ("exits", "io_exits", "mmio_exits", "halt_exits", "irq_exits", "pf_taken", "insn_emulation", "signal_exits")

Figures = dict[str, float]


def command(monitor: str, kernel: str, console: str, *options: str) -> list[str]:
    """What starts a machine with one vCPU and a source of entropy, as either monitor makes it when nothing else is
    said: its console is standard output, or the socket `console`."""
    words = ["kernel", "initrd", "append"]
    files = (f"{BOOT}/{kernel}", f"{BOOT}/initramfs", QUICK)
    if monitor == "viaduct":
        boot = [word for name, value in zip(words, files, strict=True) for word in (f"--{name}", value)]
        end = f"socket:{console}" if console else "stdio"
        size = ["--memory", f"{MEMORY >> 20}M", "--transport", "mmio"]
        return ["viaduct", "run", "--name", "bench", *size, "--console", end, *boot, *options]
    boot = [word for name, value in zip(words, files, strict=True) for word in (f"-{name}", value)]
    end = f"socket,id=console,path={console},server=on,wait=on" if console else "stdio,id=console,signal=off"
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "microvm,isa-serial=on", "-accel", "kvm", "-cpu", "host", "-m", f"{MEMORY >> 20}M",
        "-chardev", end, "-serial", "chardev:console", "-device", "virtio-rng-device", *boot, *options,
    ]  # fmt: skip


def start(monitor: str, kernel: str) -> Figures:
    """Seconds until the first line of the guest's first process; memory and exits when its shell is ready."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command(monitor, kernel, ""), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0
    )
    try:
        said = _read_until(process, b"", b"\ninit at ", b"init at ")
        seconds = time.monotonic() - begin
        said = _read_until(process, said, b"\nready ", b"ready ")
        counts = exits(process.pid)
        memory = own_memory(Path(f"/proc/{process.pid}/smaps").read_text(), MEMORY)
        status = Path(f"/proc/{process.pid}/status").read_text()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    return {
        "seconds": seconds,
        "uptime": float(said.partition(b"init at ")[2].split()[0]),
        "resident": memory.resident,
        "proportional": memory.proportional,
        "guest": memory.guest,
        "threads": int(status.partition("Threads:")[2].split()[0]),
        **{name: counts.get(name, 0) for name in COUNTED},
    }


def _read_until(process: subprocess.Popen[bytes], said: bytes, *words: bytes) -> bytes:
    """Reads the console until a whole line begins with one of these words. Raises PeerError when none comes."""
    assert process.stdout is not None
    end = time.monotonic() + PATIENCE
    while not any(_whole_line(said, word) for word in words):
        if not select.select([process.stdout], [], [], max(0, end - time.monotonic()))[0]:
            raise PeerError(f"{process.args!r}: no {words!r} in time\n{said.decode(errors='replace')}")
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            raise PeerError(f"{process.args!r}: ended before {words!r}\n{said.decode(errors='replace')}")
        said += data
    return said


def _whole_line(said: bytes, word: bytes) -> bool:
    at = said.find(word)
    return at >= 0 and (at == 0 or word[:1] == b"\n" or said[at - 1 : at] == b"\n") and b"\n" in said[at + len(word) :]


def _guest(monitor: str, directory: Path, options: Sequence[str]) -> Guest:
    """A guest that answers scripts."""
    console = str(directory / "bench.console")
    return Guest("bench", command(monitor, "vmlinux", console, *options), directory)


def disk_guest(monitor: str, directory: Path, disk: Path) -> Guest:
    """A guest with a disk of ours, and the lab's root to read fio from. Both monitors read the file through the host's
    cache by io_uring, on a thread of its own."""
    if monitor == "viaduct":
        options = ["--disk", f"{disk},serial=bench", "--disk", f"{ROOT},ro,serial=root"]
        return _guest(monitor, directory, options)
    options = ["-object", "iothread,id=io0"]
    for name, file, only in (("bench", disk, "off"), ("root", Path(ROOT), "on")):
        drive = f"if=none,id={name},format=raw,file={file},readonly={only},cache=writeback,aio=io_uring"
        options += ["-drive", drive, "-device", f"virtio-blk-device,drive={name},serial={name},iothread=io0"]
    return _guest(monitor, directory, options)


def block(guest: Guest) -> Figures:
    """fio's random reads of 4 KiB, several at once, past the guest's own cache."""
    found = guest.run("for disk in /sys/block/vd*; do echo $(cat $disk/serial) /dev/${disk##*/}; done", PATIENCE)
    names = dict(line.split() for line in found.splitlines())
    guest.run(
        f"mkdir /tmp/root && mount -t erofs -o ro {names['root']} /tmp/root && mount --bind /dev /tmp/root/dev && "
        "mount -t tmpfs tmp /tmp/root/tmp",
        PATIENCE,
    )
    output = guest.run(
        f"cd /tmp/root/tmp && chroot /tmp/root fio --name=read --filename={names['bench']} --rw=randread --bs=4k "
        f"--direct=1 --ioengine=libaio --iodepth={DEPTH} --time_based --runtime={FIO_S} --ramp_time=1 --minimal",
        PATIENCE,
    )
    return {"iops": float(output.split(";")[7])}  # fio's HOWTO, "Terse output": version 3


def card_guest(monitor: str, directory: Path, vhost: bool) -> Guest:
    """A guest whose card is the tap, its rings served by the monitor or by vhost-net."""
    if monitor == "viaduct":
        nic = f"tap:{TAP},mac={MAC}{',path=vhost' if vhost else ''}"
        return _guest(monitor, directory, ["--nic", nic])
    tap = f"tap,id=n0,ifname={TAP},script=no,downscript=no,vhost={'on' if vhost else 'off'}"
    return _guest(monitor, directory, ["-netdev", tap, "-device", f"virtio-net-device,netdev=n0,mac={MAC}"])


def stream(guest: Guest) -> Figures:
    """TCP between the guest and the lab's kernel, one way and the other, each byte compared where it arrives."""
    guest.run(f"ip link set eth0 up && ip addr add {GUEST}/24 dev eth0", PATIENCE)
    guest.run(f"transfer serve {PORT} >/dev/null 2>&1 &", PATIENCE)
    guest.run(f"transfer send {HOST} {PORT} 1 1", PATIENCE)  # addresses are resolved, windows are open
    _send_from_host(1)
    begin = time.monotonic()
    guest.run(f"transfer send {HOST} {PORT} {STREAM_MIB} 1", PATIENCE)
    out = time.monotonic() - begin
    return {"out": (STREAM_MIB << 20) / out, "into": (STREAM_MIB << 20) / _send_from_host(STREAM_MIB)}


def _send_from_host(mebibytes: int) -> float:
    begin = time.monotonic()
    command = ["/guest/transfer", "send", GUEST, str(PORT), str(mebibytes), "1"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)
    return time.monotonic() - begin


@contextmanager
def tap() -> Iterator[None]:
    """The interface that guests' cards end in, and somebody behind it who takes streams."""
    subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr"], check=True)
    server = subprocess.Popen(["/guest/transfer", "serve", str(PORT)], stdout=subprocess.DEVNULL)
    try:
        subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", TAP], check=True)
        subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
        yield
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
        subprocess.run(["ip", "link", "delete", TAP], check=True)


def _in_guest(make: Callable[[Path], Guest], measure: Callable[[Guest], Figures]) -> Figures:
    with tempfile.TemporaryDirectory() as directory:
        guest = make(Path(directory))
        try:
            guest.start()
            guest.wait_ready(PATIENCE)
            figures = measure(guest)
            guest.kill()
        finally:
            guest.stop()
    return figures


def turn(monitor: str, measure: str, disk: Path) -> Figures:
    """One machine, started for one measure."""
    match measure:
        case "start":
            return start(monitor, "vmlinux")
        case "start, bzImage":
            return start(monitor, "bzImage")
        case "block":
            return _in_guest(lambda directory: disk_guest(monitor, directory, disk), block)
        case "stream" | "stream, vhost-net":
            return _in_guest(lambda directory: card_guest(monitor, directory, measure != "stream"), stream)
    raise ValueError(f"there is no measure {measure!r}")


def main() -> None:
    """Measure so many rounds, in each of which both have their turn at everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine_rounds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measures", default="start,block,stream,stream+vhost-net", help="separated by commas")
    arguments = parser.parse_args()
    measures = [measure.replace("+", ", ") for measure in arguments.measures.split(",")]
    with tempfile.TemporaryDirectory() as scratch, tap():
        disk = Path(scratch) / "disk"
        disk.write_bytes(bytes(range(256)) * (DISK >> 8))
        for number in range(arguments.rounds):
            for measure in measures:
                for monitor in MONITORS if number % 2 else reversed(MONITORS):
                    try:
                        figures = turn(monitor, measure, disk)
                    except (PeerError, subprocess.SubprocessError) as error:
                        print(f"round {number}, {measure}, {monitor}: left out: {error}", file=sys.stderr, flush=True)
                        continue
                    print(json.dumps({"round": number, "measure": measure, "monitor": monitor, **figures}), flush=True)


if __name__ == "__main__":
    main()
