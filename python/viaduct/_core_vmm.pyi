"""The part of `viaduct._core` that is a virtual machine. It is no module of its own: import from `viaduct._core`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, final

from viaduct._core import GuestMemory

class BusDevice:
    """A device made in Rust, for `Vm.add_pio` and `Vm.add_mmio`: its exits never take the interpreter lock.

    Classes of devices derive from this one; Python cannot make a bare one.
    """

    @property
    def name(self) -> str:
        """What traces and errors call it."""

class PythonDevice(Protocol):
    """A device written in Python. Its methods are called on threads of vCPUs, so locks are its own affair.

    What it raises is logged and told to the machine's owner as event "device-error"; the guest reads ones.
    """

    def read(self, offset: int, size: int, /) -> bytes | int:
        """What `size` (1, 2, 4 or 8) bytes at `offset` from the range's first address are; an int is little-endian."""
    def write(self, offset: int, data: bytes, /) -> None:
        """The guest has written `data` at `offset`."""

@final
class Vm:
    """A virtual machine: memory, vCPUs as threads, interrupts, and two buses. It does not run until `start`.

    Errors of the engine: OSError with what was asked of the host's kernel; ValueError for what makes no sense
    (memory that is not whole pages, more vCPUs than allowed); RuntimeError for what this host cannot do.

    `on_event(kind, detail)` is called on threads of vCPUs and must not wait for the machine. `detail` has "vcpu"
    unless said otherwise. Kinds: "paused" (all vCPUs are parked, after `request_pause` or one of the following);
    "halted" (HLT without interrupts: that vCPU waits for the next `resume`); "triple-fault" and "failed" ("reason"),
    both with "address", "registers" and "code", the instruction's bytes; "system-event" ("type", "data":
    KVM_SYSTEM_EVENT_*); "debug" ("address", "dr6"); "device-error" ("device", "error", "failures"; no "vcpu"). Triple
    fault, failure, system event and debug pause the machine.
    """

    def __new__(
        cls,
        engine: Literal["kvm"],
        memory: GuestMemory,
        vcpus: int,
        *,
        interrupts: Literal["kernel", "split", "none"] = "kernel",
        dirty_ring: int | None = None,
        on_event: Callable[[str, dict[str, Any]], object] | None = None,
    ) -> Vm:
        """`interrupts`: all controllers in the engine; the local APICs there and the IOAPIC in this process, with
        neither PICs nor interval timer; or none. `dirty_ring`: how many written pages each vCPU can note in a ring, a
        power of two; None: bitmaps over all memory (docs/engine.md)."""
    def add_pio(self, base: int, size: int, device: BusDevice | PythonDevice, name: str | None = None) -> None:
        """Puts a device at `size` ports from `base`. `name` is for devices in Python; without it, their class's.

        Raises ValueError where another device is there already, or the range does not fit.
        """
    def add_mmio(self, base: int, size: int, device: BusDevice | PythonDevice, name: str | None = None) -> None:
        """The same with guest-physical addresses. Memory, where there is some, hides a device."""
    def remove_pio(self, base: int) -> None:
        """Takes the range that begins at `base` away. Raises ValueError if there is none."""
    def remove_mmio(self, base: int) -> None:
        """The same with addresses."""
    def set_memory(self, memory: GuestMemory) -> None:
        """From now on this is the guest's memory. Regions that stay are not touched; vCPUs may be running."""
    def log_dirty_pages(self, on: bool) -> None:
        """From now on it is noted which pages the vCPUs write, or no longer; devices have logs of their own.

        What was noted and not taken is forgotten by False.
        """
    def take_dirty_pages(self) -> list[int]:
        """Guest-physical addresses of the pages (4096 bytes) written since this was last called.

        Those of the last moment are in it only while the machine is paused. Raises ValueError if nothing is noted.
        """
    def set_line(self, gsi: int, level: bool) -> None:
        """Drives an input pin (0 to 23) of the interrupt controllers."""
    def signal_msi(self, address: int, data: int) -> None:
        """Sends a message-signalled interrupt."""
    @property
    def vcpus(self) -> int: ...
    def registers(self, vcpu: int) -> dict[str, Any]:
        """The registers of a vCPU that does not run, by name.

        rax ... r15, rip, rflags, cr0, cr2, cr3, cr4, cr8, efer, apic_base are ints; cs, ds, es, ss, fs, gs, tr, ldt are
        (selector, base, limit, type, dpl, present, l, db, s, g) (Intel SDM 3, 3.4.5); gdt and idt are (base, limit).
        Raises ValueError while the vCPU runs.
        """
    def set_registers(self, vcpu: int, values: Mapping[str, object]) -> None:
        """Changes the registers that are named; raises KeyError for an unknown name, ValueError while the vCPU runs."""
    def start(self, *, paused: bool = False) -> None:
        """Starts a thread for each vCPU, and the guest, or, `paused`, not yet the guest: event "paused" follows."""
    def serve_gdb(self, port: int, *, wait: bool = False) -> int:
        """Listens for gdb on a port of the loopback interface, 0 for any, and returns it. The machine must be started.

        The guest runs when neither gdb nor the owner has paused it. `wait`: gdb has, from now on, until one has come
        that lets it go on. An event "triple-fault" or "failed" is gdb's first, and the owner's when gdb continues.
        """
    @property
    def gdb(self) -> Literal["awaited", "absent", "stopped", "running"] | None:
        """Whether gdb is attached, and the guest stands still for it; None: it is not listened for."""
    def request_pause(self) -> None:
        """Asks all vCPUs to stop before their next instruction. Event "paused" follows."""
    def wait_paused(self, seconds: float) -> bool:
        """Waits until all vCPUs are parked, and says whether they are. Not for a thread with an event loop."""
    @property
    def paused(self) -> bool:
        """Whether all vCPUs are parked after a pause."""
    def resume(self) -> None:
        """Lets all vCPUs go on, those that have halted as well; when gdb has paused them, as soon as it goes on."""
    def save(self) -> str:
        """vCPUs, interrupt controllers and clocks of a paused machine as JSON. Memory and devices are not in it."""
    def restore(self, state: str) -> None:
        """Puts that back into a machine made alike, before it is started or while it is paused.

        Raises ValueError for a state that is none; OSError or RuntimeError where this host cannot be like the old one.
        """
    def reset(self) -> None:
        """Makes vCPUs, interrupt controllers and clocks those of a new machine, while it is paused.

        The caller resets devices, loads the kernel anew, sets registers, and resumes.
        """
    def stop(self) -> None:
        """Ends the threads of all vCPUs, and waits for them."""
    def close(self) -> None:
        """`stop`, and forgets all devices and the callback."""
    def exits(self) -> list[tuple[int, str, int | None, str, int, int]]:
        """vCPU, reason, port or address, device, count and nanoseconds until the answer, of each kind of exit.

        Without an address: the reason has none, or many addresses are counted together.
        """
    def guest_time(self) -> list[int]:
        """Nanoseconds that each vCPU has spent in the engine: in the guest, or waiting there for an interrupt."""

class VirtioBackend(Protocol):
    """What stands behind a virtio transport. Called on threads of vCPUs, in the middle of the instruction that wrote a
    register: each may wait for another thread."""

    def activate(self, features: int, queues: list[tuple[int, int, int, int, int, int, int]], /) -> None:
        """The driver is ready: the queues run from their beginning. Of each: index, size, guest-physical address of
        the descriptor, driver and device part, kick and call eventfd, which are the transport's. An exception's text
        becomes the reason why the device needs a reset (virtio 1.2, 2.1.2)."""
    def reset(self) -> None:
        """The driver resets the device: on return no queue is touched any more. Called after every `activate`, one
        that failed as well, before the next."""
    def write_config(self, offset: int, data: bytes, /) -> bytes | None:
        """The driver writes to configuration space, inside of it. Returns the whole space if it is another one now."""
    def driver_error(self, text: str, /) -> None:
        """The driver broke a rule. Said at most 16 times in the life of a transport."""

@final
class VirtioMmio(BusDevice):
    """A virtio device as registers at `address` (virtio 1.2, 4.2); the caller puts it on the bus there, with `SIZE`.

    `queue_sizes` are powers of two up to 32768; features that the transport does not have are left out of `features`.
    The interrupt `gsi` is to be described as edge-triggered. `name` is what traces and errors call it. Raises
    ValueError for what cannot be, or what the engine refused.
    """

    SIZE: int
    """Addresses that it takes."""

    def __new__(
        cls,
        vm: Vm,
        backend: VirtioBackend,
        *,
        name: str,
        device_id: int,
        features: int,
        queue_sizes: Sequence[int],
        address: int,
        gsi: int,
        config: bytes = b"",
    ) -> VirtioMmio: ...
    @property
    def status(self) -> int:
        """The device status field (virtio 1.2, 2.1)."""
    def config_changed(self, config: bytes) -> None:
        """The device has this configuration space now; a running driver is interrupted if it is another one. Any thread
        may call. Raises ValueError above 4096 bytes."""
    def needs_reset(self) -> None:
        """The device cannot go on until it is reset; tells the driver (virtio 1.2, 2.1.2). Any thread may call."""
    def power_on(self) -> None:
        """Back to the state after power-on, which resets the back-end if it was activated: not to be called on a thread
        that the back-end waits for."""
    def running_queues(self) -> tuple[int, list[tuple[int, int, int, int, int, int, int]]]:
        """Features agreed upon, and queues as for `VirtioBackend.activate`; no queues unless the driver has started
        them. Raises ValueError unless the machine is paused."""
    def save(self) -> bytes:
        """Everything that the driver wrote, as JSON. Raises ValueError unless the machine is paused."""
    def restore(self, state: bytes) -> None:
        """Goes on from a saved state: the caller activates the back-end, with `running_queues` and where they stood,
        and signals every eventfd of theirs once. Raises ValueError for the state of another device."""

class PciFunction:
    """A PCI function made in Rust, for `PciRoot.add`. Python cannot make a bare one."""

    @property
    def name(self) -> str:
        """What traces and errors call it."""

@final
class PciRoot:
    """PCI bus 0 of a machine, with a host bridge in slot 0.

    `ports`, `memory32` and `memory64` are first address and size of the windows in which base address registers get
    their first addresses; INTA of slot n is interrupt `gsis[n % 4]`. Raises ValueError for windows that are none.
    """

    def __new__(
        cls,
        vm: Vm,
        *,
        ports: tuple[int, int],
        memory32: tuple[int, int],
        memory64: tuple[int, int],
        gsis: tuple[int, int, int, int],
    ) -> PciRoot: ...
    def add(self, function: PciFunction, slot: int | None = None) -> int:
        """Puts a function into slot 1 to 31, or the first free one; returns which. Raises ValueError if it is taken, or
        there is no room in the windows."""
    def ecam(self) -> BusDevice:
        """Configuration space by addresses: 1 MiB for each bus number that is to be answered."""
    def config_ports(self, reset_control: BusDevice | None = None) -> BusDevice:
        """Configuration space by the 8 ports from 0xCF8 on; `reset_control` is the register at 0xCF9 inside of them."""
    def functions(self) -> list[tuple[int, str, list[int | None]]]:
        """Of each function: slot, name, and where its six base address registers answer."""
    def power_on(self) -> None:
        """Bus and functions as after power-on, which resets back-ends: not to be called on a thread they wait for. The
        machine is paused."""
    def save(self) -> bytes:
        """What drivers wrote about all functions alike, as JSON; functions save themselves. The machine is paused."""
    def restore(self, state: bytes) -> None:
        """Goes on from a saved state, before the functions do. Raises ValueError for the state of other functions."""

@final
class VirtioPci(PciFunction):
    """A virtio device as a PCI function (virtio 1.2, 4.1), for `PciRoot.add`; it runs in a slot only.

    Parameters as for `VirtioMmio`. `transitional`: for drivers of before virtio 1.0 as well. `port_notify`:
    notifications by ports too, which exit faster; at most 64 queues then, otherwise 1024.
    """

    def __new__(
        cls,
        vm: Vm,
        backend: VirtioBackend,
        *,
        name: str,
        device_id: int,
        features: int,
        queue_sizes: Sequence[int],
        config: bytes = b"",
        transitional: bool = False,
        port_notify: bool = False,
    ) -> VirtioPci: ...
    @staticmethod
    def has_transitional_id(device_id: int) -> bool:
        """Whether there can be a transitional device of this kind (virtio 1.2, 4.1.2.1)."""
    @property
    def status(self) -> int:
        """See `VirtioMmio.status`."""
    def config_changed(self, config: bytes) -> None:
        """See `VirtioMmio.config_changed`."""
    def needs_reset(self) -> None:
        """See `VirtioMmio.needs_reset`."""
    def running_queues(self) -> tuple[int, list[tuple[int, int, int, int, int, int, int]]]:
        """See `VirtioMmio.running_queues`."""
    def save(self) -> bytes:
        """See `VirtioMmio.save`; `PciRoot.save` has the rest. `PciRoot.power_on` resets it."""
    def restore(self, state: bytes) -> None:
        """See `VirtioMmio.restore`; after `PciRoot.restore`."""
