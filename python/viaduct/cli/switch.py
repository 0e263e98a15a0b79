"""`viaduct switch`: run a switch until it is told to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from viaduct.switch.config import SwitchConfig


def switch(
    port: Annotated[
        list[str] | None,
        typer.Option("--port", "-p", metavar="NAME=KIND:ARG[,opt[=val]]...", help="A port; repeatable."),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file; SIGHUP reads it again.")] = None,
    control: Annotated[
        str | None, typer.Option(metavar="SOCKET", help="Where to listen for `viaduct port`, `stats` and the others.")
    ] = None,
    pollers: Annotated[
        str | None,
        typer.Option(metavar="CPU[,CPU]...", help="One poller thread on each of these CPUs [default: one, free]."),
    ] = None,
    polling: Annotated[
        str | None,
        typer.Option(
            metavar="adaptive|busy|interrupt",
            help="Spin while packets flow and sleep when not; never sleep; or never spin [default: adaptive].",
        ),
    ] = None,
    control_group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Its members may use the control socket as this user may.")
    ] = None,
    control_readers: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Its members may ask for counters, ports and events only.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS:PORT|unix:PATH",
            help="Serve all counters to Prometheus there, such as 127.0.0.1:9100; see docs/reliability.md.",
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"] | None,
        typer.Option(help="Log lines for people or programs, also on a terminal."),
    ] = None,
    sandbox: Annotated[
        Literal["auto", "off", "strict"],
        typer.Option(help="Give up what no switch needs; nothing; or also all files but those named here."),
    ] = "auto",
    sandbox_path: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIRECTORY", help="Stays writable in the sandbox, for ports to come; repeatable."),
    ] = None,
) -> None:
    """Run a switch until it is told to end.

    A live table on a terminal, log lines elsewhere. SIGTERM or Ctrl-C ends it and removes its sockets.

    Ports:

    \b
        vhost-user:PATH[,client][,queues=N][,mtu=N]    a socket for a virtual machine's network card
        tap:IFNAME[,queues=N]                          an interface of this host's kernel
        pcap:FILE[,out=FILE]                           replay a capture, record into another
        null                                           swallow everything
      for the socket of a vhost-user port, who may connect: ,mode=0660 ,group=NAME ,allow=USER[:GROUP]+...
      and for each  ,vlan=ID (access) or ,trunk=A-B or ,trunk=A-B+C

    Examples:

    \b
        viaduct switch --port vm1=vhost-user:/tmp/vm1.sock --port vm2=vhost-user:/tmp/vm2.sock
        viaduct switch -p vm1=vhost-user:/tmp/vm1.sock,vlan=10 -p up=tap:tap0,trunk=10-20
        viaduct switch --config net.toml --pollers 2,3
        viaduct switch --config net.toml --log-format json --metrics 127.0.0.1:9100

    A configuration file says the same:

    \b
        polling = "adaptive"
        [ports.vm1]
        kind = "vhost-user"
        path = "/tmp/vm1.sock"
        queues = 2
    """
    from viaduct.switch.control_access import resolve_groups
    from viaduct.switch.handover_format import Sources
    from viaduct.switch.metrics_address import parse_metrics_address

    from .daemon import ProcessOptions, run
    from .failure import config_errors

    def read() -> SwitchConfig:
        return configuration(port or [], config, pollers, polling)

    paths = tuple(str(directory.absolute()) for directory in sandbox_path or ())
    with config_errors():
        options = ProcessOptions(
            control=control,
            log_format=log_format,
            metrics=parse_metrics_address(metrics) if metrics else None,
            sandbox=sandbox,
            sandbox_paths=paths,
            access=resolve_groups(control_group, control_readers),
            sources=Sources(
                ports=port or [],
                config=str(config) if config else None,
                pollers=pollers,
                polling=polling,
                metrics=metrics,
                log_format=log_format,
                sandbox=sandbox,
                sandbox_paths=paths,
                control_group=control_group,
                control_readers=control_readers,
            ),
        )
        first = read()
    run(first, read if config else None, options)


def configuration(ports: list[str], file: Path | None, pollers: str | None, polling: str | None) -> SwitchConfig:
    """The file's configuration, with what the command line adds and overrides."""
    import msgspec

    from viaduct.switch.config import ConfigError, SwitchConfig, build_config
    from viaduct.switch.port_text import parse_named_port

    made = SwitchConfig()
    if file is not None:
        from viaduct.switch.config_toml import load_config

        made = load_config(file)
    try:
        for text in ports:
            name, port = parse_named_port(text)
            made = made.with_port(name, port)
    except ConfigError as error:
        raise error if error.source else error.at(f"port {text!r}") from None
    plain = {name: value for name, value in msgspec.structs.asdict(made).items() if name != "ports"}
    if pollers is not None:
        try:
            plain["pollers"] = [int(cpu) for cpu in pollers.split(",")]
        except ValueError:
            raise ConfigError(f"{pollers!r} is not a list of CPU numbers such as 2,3", source="--pollers") from None
    if polling is not None:
        plain["polling"] = polling
    return build_config({**plain, "ports": made.ports})
