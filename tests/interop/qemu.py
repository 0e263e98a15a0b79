"""QEMU guests: Debian's kernel in software emulation, vhost-user network devices, and a shell that the test commands.

A guest's network device is a `Nic`: where its socket is, who listens on it, and which virtio features QEMU offers the
driver. `Guest.run` runs a shell script in the guest and returns its output; the image's `init.sh` is the other end.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import select
import shlex
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from interop.guest_image import GuestImage
from interop.peer_process import PATIENCE, TAIL, PeerError, PeerProcess, require, wait_until

KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=0 nokaslr mitigations=off init_on_alloc=0 tsc=reliable no_timer_check "
    "random.trust_cpu=on rdinit=/init"
)
DRIVER = "/sys/bus/virtio/drivers/virtio_net"


class Attachment(Protocol):
    """A device that QEMU attaches to a guest."""

    def arguments(self, index: int) -> list[str]:
        """QEMU's arguments for it as the guest's device number `index`."""


@dataclass(frozen=True)
class Nic:
    """A virtio-net device over vhost-user, and how it differs from QEMU's defaults.

    socket: path of the vhost-user socket; server: QEMU listens on it (else QEMU connects, and reconnects every second);
    off: further feature properties of QEMU's virtio-net device to switch off; mtu: advertised to the driver
    (VIRTIO_NET_F_MTU); iommu: it is behind the guest's IOMMU, if that has one, on a port of its own, as devices that
    cache translations are.
    """

    socket: Path
    mac: str
    server: bool = False
    packed: bool = False
    mergeable: bool = True
    event_index: bool = True
    indirect: bool = True
    queue_pairs: int = 1
    off: tuple[str, ...] = ()
    mtu: int | None = None
    iommu: bool = False

    def arguments(self, index: int) -> list[str]:
        """QEMU's arguments for this device as the guest's interface number `index`."""
        listen = "server=on,wait=off" if self.server else "reconnect=1"
        properties = {
            "mac": self.mac,
            "addr": f"0x{0x10 + index:x}",
            "packed": _switch(self.packed),
            "mrg_rxbuf": _switch(self.mergeable),
            "event_idx": _switch(self.event_index),
            "indirect_desc": _switch(self.indirect),
            "romfile": "",
            # Without KVM, QEMU 7.2 crashes when a driver starts a vhost-user network device that has MSI-X interrupts.
            "vectors": "0",
            **{feature: "off" for feature in self.off},
        }
        port: list[str] = []
        if self.iommu:
            port = ["-device", f"pcie-root-port,id=p{index},chassis={index + 1},addr={properties.pop('addr')}"]
            properties |= {"bus": f"p{index}", "disable-legacy": "on", "iommu_platform": "on", "ats": "on"}
        if self.queue_pairs > 1:
            properties |= {"mq": "on"}
        if self.mtu is not None:
            properties["host_mtu"] = str(self.mtu)
        settings = ",".join(f"{key}={value}" for key, value in properties.items())
        return [
            "-chardev", f"socket,id=c{index},path={self.socket},{listen}",
            "-netdev", f"vhost-user,id=n{index},chardev=c{index},queues={self.queue_pairs}",
            *port,
            "-device", f"virtio-net-pci,netdev=n{index},{settings}",
        ]  # fmt: skip


def _switch(on: bool) -> str:
    return "on" if on else "off"


@dataclass
class Answer:
    """What a script in a guest left: its exit status and its output and errors together."""

    status: int
    output: str


@dataclass
class Guest:
    """One virtual machine. `with Guest(...) as guest:` starts it, waits until it is up, and ends it.

    devices: further devices of QEMU's, which come before the network's; kernel_arguments: further ones; qemu: how
    another QEMU than the installed one is started.
    """

    name: str
    image: GuestImage
    directory: Path
    nics: tuple[Attachment, ...]
    memory: str = "384M"
    processors: int = 1
    devices: tuple[str, ...] = ()
    kernel_arguments: str = ""
    qemu: tuple[str, ...] = ()
    boot_id: str = ""
    incoming: Path | None = None
    """A socket on which the guest is received from another QEMU: it does not boot, and runs once it has arrived."""
    process: PeerProcess | None = None
    _tags: itertools.count[int] = field(default_factory=itertools.count)
    _received: bytes = b""

    def start(self) -> None:
        """Start QEMU. It waits by itself for back-ends that are not there yet; `wait_ready` waits for the guest.

        Raises PeerError when QEMU is not installed or does not start.
        """
        self._console = self.directory / f"{self.name}.console"
        agent, monitor = self._socket("agent"), self._socket("monitor")
        command: list[str | Path] = [
            *(self.qemu or (require("qemu-system-x86_64", "qemu-system-x86"),)),
            "-name", self.name, "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "q35,memory-backend=ram", "-accel", "tcg,thread=multi", "-cpu", "max,-la57",
            "-smp", str(self.processors), "-m", self.memory,
            "-object", f"memory-backend-memfd,id=ram,size={self.memory},share=on",
            "-kernel", self.image.kernel, "-initrd", self.image.initramfs,
            "-append", f"{KERNEL_ARGUMENTS} {self.kernel_arguments}",
            "-serial", f"file:{self._console}",
            "-chardev", f"socket,id=agent,path={agent},server=on,wait=off", "-serial", "chardev:agent",
            "-qmp", f"unix:{monitor},server=on,wait=off",
        ]  # fmt: skip
        for device in self.devices:
            command += ["-device", device]
        if self.incoming is not None:
            command += ["-incoming", f"unix:{self.incoming}"]
        for index, nic in enumerate(self.nics):
            command += nic.arguments(index)
        self.process = PeerProcess(self.name, command, self.directory / f"{self.name}.log")
        try:
            self._agent = socket.socket(socket.AF_UNIX)
            self.process.wait_for(lambda: self._agent.connect_ex(str(agent)) == 0, "its agent's socket")
        except BaseException:
            self.process.kill()
            raise

    def _socket(self, role: str) -> Path:
        path = self.directory / f"{self.name}.{role}"
        path.unlink(missing_ok=True)
        return path

    def wait_ready(self, seconds: float = PATIENCE) -> None:
        """Wait until a boot that was not seen before is announced."""
        before = self.boot_id
        end = time.monotonic() + seconds
        while self.boot_id == before:
            line = self._line(end, "the boot")
            if line.startswith("ready "):
                self.boot_id = line.split()[1]

    def run(self, script: str, seconds: float = PATIENCE, check: bool = True) -> str:
        """Run a shell script in the guest and return what it wrote.

        Raises PeerError when it takes longer than `seconds`, and with `check` also when its status is not 0.
        """
        answer = self.ask(script, seconds)
        if check and answer.status != 0:
            raise PeerError(
                f"{self.name}: status {answer.status} from\n{script}\n{answer.output}\n{self.kernel_messages()}"
            )
        return answer.output

    def ask(self, script: str, seconds: float = PATIENCE) -> Answer:
        """Run a shell script in the guest and return its status and output; raises PeerError after `seconds`."""
        tag = f"request{next(self._tags)}"
        self._agent.sendall(f"{tag} {base64.b64encode(script.encode()).decode()}\n".encode())
        end = time.monotonic() + seconds
        while True:
            words = self._line(end, script).split()
            if words[:1] == [tag]:
                return Answer(int(words[1]), base64.b64decode(words[2]).decode(errors="replace") if words[2:] else "")

    def _line(self, end: float, what: str) -> str:
        while b"\n" not in self._received:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._agent], [], [], left)[0]:
                raise PeerError(f"{self.name}: no answer in time to\n{what}\n{self.evidence()}")
            data = self._agent.recv(65536)
            if not data:
                raise PeerError(f"{self.name}: QEMU ended during\n{what}\n{self.evidence()}")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return line.decode(errors="replace").strip()

    def kernel_messages(self) -> str:
        """The end of the guest's kernel log."""
        return self.ask("dmesg | tail -n 15", 20).output

    def console(self) -> str:
        """All that the guest has written to its console."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def evidence(self) -> str:
        """The ends of QEMU's log and of the guest's console."""
        return f"QEMU:\n{self.process.tail() if self.process else ''}\nconsole:\n{self.console()[-TAIL:]}"

    def monitor(self, command: str, **arguments: object) -> object:
        """Execute one QMP command and return what it returns; raises PeerError when QEMU refuses it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self.directory / f"{self.name}.monitor"))
            stream = connection.makefile("rw")
            json.loads(stream.readline())
            answer: dict[str, Any] = {}
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                answer = json.loads(stream.readline())
                while "event" in answer:
                    answer = json.loads(stream.readline())
            if "error" in answer:
                raise PeerError(f"{self.name}: QMP {command}: {answer['error']}")
            return answer["return"]

    def configure(self, interface: int, *addresses: str, mtu: int | None = None) -> None:
        """Bring an interface up with addresses such as "10.0.0.1/24" and "fd00::1/64"."""
        script = [f"ip link set eth{interface} mtu {mtu}"] if mtu else []
        script.append(f"ip link set eth{interface} up")
        for address in addresses:
            script.append(f"ip {'-6 ' if ':' in address else ''}addr replace {address} dev eth{interface}")
        self.run("set -e\n" + "\n".join(script))

    def ping(self, address: str, count: int = 3, size: int = 56, seconds: float = PATIENCE) -> None:
        """Ping; every echo must return. `size` is the payload; fragments are forbidden by no option of busybox."""
        command = f"ping -A -c {count} -s {size} -W 10 -w {seconds:.0f} {address}"
        output = self.run(command, seconds + 10, check=False)
        if f"{count} packets received" not in output:
            raise PeerError(f"{self.name}: {command}\n{output}\n{self.kernel_messages()}")

    def wait_ping(self, address: str, seconds: float = PATIENCE) -> None:
        """Wait until a ping is answered, as after a link that comes back."""
        wait_until(lambda: self.ask(f"ping -c 1 -W 1 {address}").status == 0, f"{self.name} reaches {address}", seconds)

    def wait_reached(self, address: str, port: int = 5001, seconds: float = PATIENCE) -> None:
        """Wait until a guest that serves transfers answers, asked every 20 ms: as soon as frames pass both ways."""
        self.run(f"transfer reach {address} {port} 20", seconds)

    def serve_transfers(self, port: int = 5001) -> None:
        """Accept the transfers of other guests."""
        self.run(f"transfer serve {port} >/tmp/serve.log 2>&1 &")
        wait_until(lambda: f":{port:04X} " in self.run("cat /proc/net/tcp6"), f"{self.name} listens on port {port}")

    def send_transfer(
        self, address: str, mebibytes: int, flows: int = 1, port: int = 5001, seconds: float = 120
    ) -> str:
        """Send a checked stream to a guest that serves transfers; raises PeerError unless each byte arrived right."""
        return self.run(f"transfer send {address} {port} {mebibytes} {flows}", seconds)

    def echo_datagrams(self, address: str, count: int, size: int, port: int = 5001) -> None:
        """Exchange checked UDP datagrams with a guest that serves transfers."""
        self.run(f"transfer echo {address} {port} {count} {size}")

    def checksum_errors(self) -> int:
        """How many segments and datagrams the guest's kernel has discarded for a wrong checksum."""
        text = self.run("cat /proc/net/snmp /proc/net/snmp6")
        total = sum(int(value) for value in re.findall(r"^\w+6InCsumErrors\s+(\d+)", text, re.MULTILINE))
        lines = text.splitlines()
        for heads, values in itertools.pairwise(lines):
            if "InCsumErrors" in heads and heads.split(":")[0] == values.split(":")[0]:
                total += int(values.split()[heads.split().index("InCsumErrors")])
        return total

    def virtio_device(self, interface: int) -> str:
        """The name of an interface's device on the virtio bus, "virtio0"."""
        return self.run(f"basename $(readlink /sys/class/net/eth{interface}/device)").strip()

    def unbind_driver(self, interface: int) -> str:
        """Take the driver from an interface; the interface is gone. Returns the device to bind again."""
        device = self.virtio_device(interface)
        self.run(f"echo {device} >{DRIVER}/unbind")
        return device

    def bind_driver(self, device: str) -> None:
        """Give a device its driver back."""
        self.run(f"echo {shlex.quote(device)} >{DRIVER}/bind")

    def reset(self) -> None:
        """Reset the machine as its button would, without a word to the driver; wait until it is up again."""
        self.monitor("system_reset")
        self.wait_ready()

    def reboot(self) -> None:
        """Let the guest reboot itself; wait until it is up again."""
        self._agent.sendall(b"reboot " + base64.b64encode(b"reboot -f") + b"\n")
        self.wait_ready()

    def kill(self) -> None:
        """End QEMU with SIGKILL, if it runs."""
        if self.process is not None:
            self._agent.close()
            self.process.kill()

    def stop(self) -> None:
        """End QEMU with SIGTERM, if it runs."""
        if self.process is not None:
            self._agent.close()
            self.process.stop()

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
