"""`viaduct run`: a virtual machine. The words that are described here are known to `run_words` as well."""

from __future__ import annotations

from typing import Annotated

import typer

from .class_names import class_names
from .machine_run import run_configured
from .options import Json


def run(
    kernel: Annotated[
        str | None, typer.Option("--kernel", "-k", metavar="FILE", help="bzImage, vmlinux, multiboot or flat binary.")
    ] = None,
    initrd: Annotated[str | None, typer.Option(metavar="FILE", help="Initial RAM disk.")] = None,
    append: Annotated[str | None, typer.Option(metavar="TEXT", help="The kernel's command line.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", "-m", metavar="SIZE", help="RAM [default: 512M].")] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", "-c", metavar="N", help="vCPUs, 1 to 64 [default: 1].")] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option("--disk", metavar="FILE[,ro][,format=raw|qcow2]", help="A disk; repeatable."),
    ] = None,
    nic: Annotated[
        list[str] | None,
        typer.Option(
            "--nic",
            metavar="TO[,path=...][,mac=...][,queues=N]",
            help="A network card; TO is switch:NAME, vhost-user:PATH or tap:IF, path is virtio, vhost or emulated.",
        ),
    ] = None,
    share: Annotated[
        list[str] | None, typer.Option("--share", metavar="DIR[,tag=TAG]", help="A directory, by virtiofs; repeatable.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="FILE.py:CLASS[,pio=BASE+SIZE|mmio=BASE+SIZE][,irq=N][,NAME=VALUE]",
            help="A device of your own, virtio or registers on a bus; repeatable (docs/devices.md).",
            autocompletion=class_names,
        ),
    ] = None,
    vsock: Annotated[str | None, typer.Option(metavar="PATH", help="Where the guest's sockets are reached.")] = None,
    balloon: Annotated[bool, typer.Option("--balloon", help="Let the guest give memory back.")] = False,
    console: Annotated[
        str | None, typer.Option(metavar="stdio|socket:PATH|file:PATH|none", help="The guest's console.")
    ] = None,
    console_device: Annotated[
        str | None, typer.Option(metavar="serial|virtio", help="The console in the guest: ttyS0 or hvc0.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="For `viaduct vm` [default: vm1].")] = None,
    boot: Annotated[
        str | None, typer.Option(metavar="auto|bzimage|pvh|linux|multiboot|flat", help="How the kernel is started.")
    ] = None,
    transport: Annotated[str | None, typer.Option(metavar="pci|mmio", help="Where virtio devices are found.")] = None,
    transitional: Annotated[
        bool, typer.Option("--transitional", help="Virtio on PCI also for drivers from before virtio 1.0.")
    ] = False,
    port_notify: Annotated[
        bool, typer.Option("--port-notify", help="Virtio on PCI is notified at ports, if the driver can.")
    ] = False,
    interrupts: Annotated[
        str | None, typer.Option(metavar="kernel|split", help="Where the IOAPIC is: in the engine, or in this process.")
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="auto|kvm", help="What executes the guest.")] = None,
    on_reset: Annotated[str | None, typer.Option(metavar="restart|stop", help="What a guest's reset does.")] = None,
    gdb: Annotated[int | None, typer.Option(metavar="PORT", help="Wait for gdb at 127.0.0.1:PORT, then begin.")] = None,
    config: Annotated[str | None, typer.Option("--config", metavar="FILE.toml", help="All of it, from a file.")] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="exits", help="Show where the guest's time goes, as it runs and at its end.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a virtual machine until its guest switches it off.

    The guest's console is this terminal; Ctrl-] leaves it and ends the machine. From elsewhere: viaduct vm list.

    \b
        viaduct run --kernel vmlinuz --initrd initrd.img --append console=ttyS0
        viaduct run --kernel vmlinuz --disk disk.img --append "console=ttyS0 root=/dev/vda1" --nic switch:web
        viaduct run --kernel vmlinuz --nic tap:tap0,path=vhost --cpus 4 --memory 2G --trace exits
        viaduct run --kernel kernel.bin --device examples/dice.py:Dice,pio=0x700+4

    Exit codes: the guest's own if it wrote one to the debug-exit port; 0 if it was switched off in an orderly way, also
    by `viaduct vm stop` or Ctrl-]; 1 if it failed or could not begin; 2 wrong usage; 128 + N if signal N ended it.
    """
    told = {
        "kernel": kernel,
        "initrd": initrd,
        "append": append,
        "memory": memory,
        "cpus": cpus,
        "disks": disk,
        "nics": nic,
        "shares": share,
        "devices": device,
        "vsock": vsock,
        "balloon": balloon,
        "console": console,
        "console_device": console_device,
        "name": name,
        "boot": boot,
        "transport": transport,
        "transitional": transitional,
        "port_notify": port_notify,
        "interrupts": interrupts,
        "engine": engine,
        "on_reset": on_reset,
        "gdb": gdb,
    }
    raise typer.Exit(run_configured(told, config=config, trace=trace, json=json))
