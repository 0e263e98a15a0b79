"""QEMU's microvm with KVM, in the lab: what a stock virtual machine monitor makes of the same guest."""

from __future__ import annotations

from pathlib import Path

GUEST = Path("/guest")
QUICK = "tsc=reliable no_timer_check mitigations=off nokaslr"
"""Kernel arguments that save a guest in the lab a second of measuring its clocks and defending itself."""


def microvm(kernel: Path, console: str, append: str = "", memory: str = "256M", processors: int = 1) -> list[str]:
    """The command line of a guest that boots `kernel`; `console` is the serial port's other end in QEMU's words."""
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "microvm,isa-serial=on", "-accel", "kvm", "-cpu", "host",
        "-m", memory, "-smp", str(processors), "-kernel", str(kernel), "-initrd", str(GUEST / "initramfs"),
        "-append", f"console=ttyS0 reboot=t panic=-1 quiet {QUICK} {append}", "-serial", console,
    ]  # fmt: skip
