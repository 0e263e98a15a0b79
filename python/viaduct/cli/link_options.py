"""The options with which `viaduct guest`, `send` and `receive` reach a back-end, in one place for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failure import USAGE, Failure

if TYPE_CHECKING:
    from viaduct.guest import LinkOptions


@dataclass(frozen=True)
class LinkArguments:
    """What the user said about the back-end and the device."""

    connect: Annotated[str | None, typer.Option(metavar="PATH", help="The back-end's socket.")] = None
    listen: Annotated[str | None, typer.Option(metavar="PATH", help="Listen here for a back-end that connects.")] = None
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="Wait so long for the back-end; 0: for ever.")] = 5.0
    ring: Annotated[str, typer.Option(metavar="split|packed", help="Ring layout.")] = "split"
    queue_size: Annotated[int, typer.Option(metavar="N", help="Descriptors of each queue.")] = 256
    queues: Annotated[int, typer.Option(metavar="N", help="Queue pairs.")] = 1
    mtu: Annotated[int, typer.Option(metavar="N", help="Largest IP packet.")] = 1500
    mrg: Annotated[bool, typer.Option("--mrg/--no-mrg", help="Mergeable receive buffers.")] = True
    event_idx: Annotated[bool, typer.Option("--event-idx/--no-event-idx", help="Notifications by index.")] = True
    indirect: Annotated[bool, typer.Option("--indirect/--no-indirect", help="Indirect descriptors.")] = False
    in_order: Annotated[bool, typer.Option("--in-order/--no-in-order", help="Buffers used in order.")] = False
    csum: Annotated[bool, typer.Option("--csum/--no-csum", help="Checksums left to the device.")] = True
    tso: Annotated[bool, typer.Option("--tso/--no-tso", help="TCP segments cut by the device.")] = True
    hugepages: Annotated[bool, typer.Option("--hugepages", help="Memory from reserved 2 MiB pages.")] = False

    @property
    def path(self) -> str:
        """The socket. Raises `Failure` unless exactly one was given."""
        path = self.connect or self.listen
        if path is None or (self.connect and self.listen):
            raise Failure("give the back-end's socket: either --connect PATH, or --listen PATH", USAGE)
        return path

    @property
    def timeout(self) -> float | None:
        """How long to wait for the back-end; None: for ever."""
        return None if self.wait <= 0 else self.wait

    def options(self) -> LinkOptions:
        """The same for `viaduct.guest`. Raises `Failure`."""
        from viaduct.guest import LinkOptions

        options = LinkOptions(
            listen=self.listen is not None,
            ring=self.ring,
            queues=self.queues,
            queue_size=self.queue_size,
            mergeable=self.mrg,
            event_idx=self.event_idx,
            indirect=self.indirect,
            in_order=self.in_order,
            checksum=self.csum,
            segmentation=self.tso,
            hugepages=self.hugepages,
            mtu=self.mtu,
        )
        with failures(USAGE):
            options.features()
        return options


def with_link(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command these options; it gets them as its first argument, a `LinkArguments`."""
    fields = inspect.signature(LinkArguments).parameters
    hints = inspect.get_annotations(LinkArguments, eval_str=True)
    own = inspect.signature(command, eval_str=True)
    _, *rest = own.parameters.values()
    link = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[name])
        for name, field in fields.items()
    ]

    def run(**given: Any) -> None:
        command(LinkArguments(**{name: given.pop(name) for name in fields}), **given)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    rest = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in rest]
    run.__signature__ = inspect.Signature([*rest, *link])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*rest, *link)}
    return run


@contextmanager
def failures(exit_code: int = 1) -> Iterator[None]:
    """What guests and sockets raise inside ends the command."""
    from viaduct.guest import GuestError
    from viaduct.vhost_user import VhostUserError

    try:
        yield
    except (GuestError, VhostUserError) as error:
        raise Failure(str(error), exit_code) from error


def describe_link(path: str, features: int, counters: dict[str, int]) -> dict[str, object]:
    """What JSON output says about the link: path, ring layout, negotiated features and counts."""
    from viaduct.virtio.features import DeviceFeature

    ring = "packed" if features & DeviceFeature.RING_PACKED else "split"
    return {"path": path, "ring": ring, "features": f"{features:#x}", **counters}
