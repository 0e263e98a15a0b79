"""Why a port passes no packets.

Theory of operation
-------------------
A packet has a long way: somebody is connected, features were agreed on, queues started and enabled, buffers offered,
the driver notified us, the frame obeyed the port's rules, its VLAN and address led somewhere, and a poller had time for
it. The port is looked at twice with a pause between, and the way is followed step by step; each step that fails gives a
`Finding`, with what was found and what to do. What depends on a step that failed is not judged.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from .config import PortConfig, TapPort, VhostUserPort
from .drop_advice import ADVICE, UNKNOWN
from .status import Direction, Event, PollerStatistics, PortStatistics, PortStatus, Statistics

if TYPE_CHECKING:
    from .switch import Switch

RECENT = 600.0
"""Seconds for which a refusal is still worth telling."""

OVERLOADED = 0.95
"""Part of a poller's time beyond which it has too much to do."""

SERIOUS = 0.1
"""Part of a port's frames that are dropped for one reason beyond which that is a problem even if it is over."""

SERIOUS_OFTEN = 0.9
"""The same for reasons that healthy ports have too."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that keeps packets from passing. `cause`: a word for programs. `remedy`: the next thing to do."""

    cause: str
    message: str
    remedy: str


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What was found on one port; nothing, if it is healthy. `seen`: what was looked at, for people."""

    port: str
    findings: tuple[Finding, ...]
    seen: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Nothing keeps packets from passing."""
        return not self.findings


class QueueState(msgspec.Struct, frozen=True):
    """A virtqueue: even ones receive, odd ones transmit, as seen by the driver (virtio 1.2, 5.1.2)."""

    index: int
    started: bool
    enabled: bool
    broken: bool
    faulted: bool
    size: int
    waiting: int
    can_kick: bool
    kicks: int

    @property
    def receives(self) -> bool:
        """Whether it is for frames to the guest."""
        return self.index % 2 == 0


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a port at one moment."""

    status: PortStatus
    others: tuple[PortStatus, ...]
    statistics: Statistics
    counters: PortStatistics
    queues: tuple[QueueState, ...]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What a diagnosis is made of: two looks, and what happened before."""

    name: str
    config: PortConfig
    configs: dict[str, PortConfig]
    first: Look
    second: Look
    events: tuple[Event, ...]
    taken: tuple[str, int, str] | None
    """An address that was heard here, its VLAN, and the port behind which it is now."""
    now: float


async def diagnose(switch: Switch, name: str, seconds: float = 1.0) -> Diagnosis:
    """Look at a port twice, `seconds` apart, and say what keeps packets from passing.

    Raises:
        ConfigError: there is no such port.
    """
    switch.config.without_port(name)  # raises with the nearest name if there is none
    first = _look(switch, name)
    await asyncio.sleep(seconds)
    switch.config.without_port(name)
    case = Case(
        name=name,
        config=switch.config.ports[name],
        configs=switch.config.ports,
        first=first,
        second=_look(switch, name),
        events=switch.history(port=name),
        taken=switch.taken_address(name),
        now=time.time(),
    )
    return Diagnosis(port=name, findings=tuple(findings(case)), seen=tuple(_seen(case.second)))


def findings(case: Case) -> Iterator[Finding]:
    """Follow the way of a packet."""
    if isinstance(case.config, VhostUserPort):
        connection = list(_connection(case, case.config))
        yield from connection
        if not connection:
            queues = list(_queues(case))
            yield from queues
            if not queues:
                yield from _traffic(case)
                yield from _iommu(case)
    elif isinstance(case.config, TapPort):
        yield from _interface(case.config)
    yield from _addresses(case)
    yield from _drops(case)
    yield from _neighbours(case)
    yield from _pollers(case)


def _look(switch: Switch, name: str) -> Look:
    statistics = switch.stats()
    (counters,) = (port for port in statistics.ports if port.name == name)
    ports = switch.ports()
    return Look(
        status=next(port for port in ports if port.name == name),
        others=tuple(port for port in ports if port.name != name),
        statistics=statistics,
        counters=counters,
        queues=tuple(QueueState(*state) for state in switch.queue_states(name)),
    )


def _seen(look: Look) -> Iterator[str]:
    status, counters = look.status, look.counters
    peer = f"pid {status.peer.pid} (uid {status.peer.uid}) is connected" if status.peer else "nobody is connected"
    yield f"{status.config}: link {status.link}" + (f", {peer}" if status.kind == "vhost-user" else "")
    for queue in look.queues:
        if queue.started:
            what = "buffers for the guest" if queue.receives else "frames from the guest"
            state = "broken" if queue.broken else "enabled" if queue.enabled else "disabled"
            yield f"queue {queue.index} ({what}): {state}, {queue.waiting} of {queue.size} waiting" + (
                "" if queue.receives else f", {queue.kicks} kicks seen"
            )
    directions: tuple[Direction, ...] = ("received", "sent")
    frames = ", ".join(f"{counters.frames(direction)} {direction}" for direction in directions)
    yield f"frames: {frames}, {sum(counters.drops().values())} dropped"


def _connection(case: Case, config: VhostUserPort) -> Iterator[Finding]:
    refused = [event for event in case.events if event.kind == "peer-refused" and case.now - event.time < RECENT]
    if case.second.status.peer is None:
        if refused:
            yield Finding(
                cause="refused",
                message=f"somebody who connected was sent away {_ago(case, refused[-1])}: {refused[-1].message}",
                remedy="if it should be served, add its user to allow= of the port",
            )
        yield _unconnected(case, config)
        return
    if refused and "second front-end" in refused[-1].message:
        yield Finding(
            cause="second-front-end",
            message=f"two front-ends want this socket: {refused[-1].message}",
            remedy="give each guest a port of its own: viaduct port add NAME=vhost-user:PATH",
        )
    connected = max((event.time for event in case.events if event.kind == "peer-connected"), default=0.0)
    for event in case.events:
        if event.kind == "request-refused" and event.time >= connected:
            yield Finding(
                cause="request-refused",
                message=f"a request of the front-end was refused {_ago(case, event)}: {event.message}",
                remedy="switch off in the front-end what is not offered, or update it; then let it connect anew",
            )
            return


def _unconnected(case: Case, config: VhostUserPort) -> Finding:
    since = next((event for event in reversed(case.events) if event.kind in ("peer-disconnected", "port-added")), None)
    when = f" since {_ago(case, since)}" if since else ""
    last = next((event for event in reversed(case.events) if event.kind == "peer-disconnected"), None)
    if config.client:
        how = "does not exist" if not os.path.exists(config.path) else "exists, but nobody serves it"
        message = f"the front-end listens, we connect, and nobody is there{when}: {config.path} {how}"
        if case.second.status.detail:
            message += f" ({case.second.status.detail})"
        remedy = "start the front-end (QEMU: -chardev socket,...,server=on); we go on trying, at least once a second"
    else:
        message = f"we listen on {config.path} and no front-end is connected{when}"
        remedy = (
            "start one: qemu-system-x86_64 ... -chardev "
            f"socket,id=c0,path={config.path},reconnect=1 -netdev vhost-user,id=n0,chardev=c0; it needs write "
            f"permission for the socket ({_permissions(config.path)})"
        )
    if last is not None and last.message:
        message += f"; the last one left because: {last.message}"
        refusal = next((event for event in reversed(case.events) if event.kind == "request-refused"), None)
        if refusal is not None and refusal.time <= last.time <= refusal.time + 1:
            remedy = f"switch off in the front-end what is refused, or update it; otherwise {remedy}"
    return Finding(cause="not-connected", message=message, remedy=remedy)


def _queues(case: Case) -> Iterator[Finding]:
    queues = case.second.queues
    if any(queue.faulted for queue in queues):
        yield Finding(
            cause="memory-faulted",
            message="the file behind the guest's memory became shorter than the front-end said",
            remedy="restart the guest; see who truncates its memory (memory-backend-file on a full disk?)",
        )
        return
    broken = [queue.index for queue in queues if queue.broken]
    if broken or case.second.status.link == "broken":
        yield Finding(
            cause="broken",
            message=f"the driver broke a rule and its queue is stopped: {case.second.status.detail}",
            remedy="reset the guest's device (reboot, or rebind its driver); if it returns, its driver is at fault",
        )
        return
    started = [queue for queue in queues if queue.started]
    if not started:
        yield Finding(
            cause="not-started",
            message="the front-end is connected, but the guest's driver has not started its queues",
            remedy="the guest may still boot, be paused, or lack the driver: modprobe virtio_net; ip link set eth0 up",
        )
        return
    for receives, word in ((True, "receive"), (False, "transmit")):
        mine = [queue for queue in started if queue.receives == receives]
        if not mine:
            yield Finding(
                cause="not-started",
                message=f"no {word} queue is started",
                remedy="the guest's driver stopped half-way; see its kernel log",
            )
        elif not any(queue.enabled for queue in mine):
            yield Finding(
                cause="not-enabled",
                message=f"the {word} queues are started, but the front-end has them disabled (SET_VRING_ENABLE)",
                remedy="let the guest run and its link up: in QEMU's monitor, cont and set_link NAME on",
            )


def _traffic(case: Case) -> Iterator[Finding]:
    before = {queue.index: queue for queue in case.first.queues}
    running = [queue for queue in case.second.queues if queue.enabled]
    buffers = [queue for queue in running if queue.receives]
    if buffers and all(queue.waiting == 0 and before[queue.index].waiting == 0 for queue in buffers):
        yield Finding(
            cause="no-buffers",
            message=f"the guest offers no receive buffers (queue {', '.join(str(queue.index) for queue in buffers)})",
            remedy="its driver is stuck or its interface is down: ip link set eth0 up, and look at the guest's load",
        )
    senders = [queue for queue in running if not queue.receives]
    frames = case.second.counters.frames("received") + sum(case.second.counters.drops("received").values())
    if senders and frames == 0 and all(queue.waiting == 0 for queue in senders):
        kicks = sum(queue.kicks for queue in senders)
        yield Finding(
            cause="no-kick",
            message="the guest has sent nothing: "
            + (f"{kicks} kicks were seen, but no frame with them" if kicks else "no kick was seen, no frame waits"),
            remedy="in the guest: ip link set eth0 up, give it an address, and ping something",
        )
    stuck = [queue for queue in senders if queue.waiting and before[queue.index].waiting]
    if stuck and case.first.counters.frames("received") == case.second.counters.frames("received"):
        limited = case.second.counters.rate_waits > case.first.counters.rate_waits
        yield Finding(
            cause="rate-limit" if limited else "stuck",
            message=f"{sum(queue.waiting for queue in stuck)} frames of the guest wait, and none was taken meanwhile"
            + (": the port has used up its rate= or pps=" if limited else ""),
            remedy="raise rate= or pps= of the port"
            if limited
            else "see whether a poller is overloaded (viaduct stats --watch)",
        )
    elif case.second.counters.rate_waits > case.first.counters.rate_waits:
        yield Finding(
            cause="rate-limit",
            message="frames of the guest wait in its ring because the port has used up its rate= or pps=",
            remedy="raise the limit, if it is not meant",
        )


def _iommu(case: Case) -> Iterator[Finding]:
    before, after = case.first.status.iommu, case.second.status.iommu
    if before is None or after is None or after.refused <= before.refused:
        return
    yield Finding(
        cause="iommu-refused",
        message=f"{after.refused - before.refused} translations that the switch asked for were refused while we "
        f"looked, {after.refused} since the guest connected",
        remedy=ADVICE["iommu"].remedy,
    )


def _interface(config: TapPort) -> Iterator[Finding]:
    try:
        with open(f"/sys/class/net/{config.ifname}/flags") as file:
            up = int(file.read(), 16) & 1
    except OSError:
        return  # in another network namespace
    if not up:
        yield Finding(
            cause="interface-down",
            message=f"the interface {config.ifname} is switched off",
            remedy=f"ip link set {config.ifname} up",
        )


def _addresses(case: Case) -> Iterator[Finding]:
    if case.taken is not None:
        mac, vlan, thief = case.taken
        yield Finding(
            cause="mac-moved",
            message=f"{mac}{f' in VLAN {vlan}' if vlan else ''} was heard here and is now behind port {thief}",
            remedy="two guests with one address, or a loop: give each its own; if it is this port's, say so: "
            f"mac={mac}. After a migration it is as it should be",
        )
    if (unlearned := case.second.counters.unlearned - case.first.counters.unlearned) > 0:
        yield Finding(
            cause="mac-quota",
            message=f"{unlearned} frames came from addresses beyond the port's quota, and answers go to all ports",
            remedy="raise macs= of the port, if the guest is to have so many addresses",
        )


def _drops(case: Case) -> Iterator[Finding]:
    directions: tuple[Direction, ...] = ("received", "sent")
    for direction in directions:
        before = case.first.counters.drops(direction)
        after = case.second.counters.drops(direction)
        passed = case.second.counters.frames(direction)
        total = passed + sum(after.values())
        for reason, number in sorted(after.items(), key=lambda item: -item[1]):
            advice = ADVICE.get(reason, UNKNOWN)
            grown = number - before.get(reason, 0)
            if number < (SERIOUS_OFTEN if advice.often else SERIOUS) * total and (advice.often or not grown):
                continue
            if direction == "sent" and reason == "link_down" and case.second.status.link != "up":
                continue  # another finding says why
            which = "frames from" if direction == "received" else "frames to"
            growing = f", {grown} of them while we looked" if grown else ""
            yield Finding(
                cause=reason,
                message=f"{number} of {total} {which} the port{growing} were dropped because {advice.meaning}",
                remedy=advice.remedy,
            )


def _neighbours(case: Case) -> Iterator[Finding]:
    others = case.second.others
    if not others:
        yield Finding(cause="alone", message="there is no other port", remedy="viaduct port add NAME=KIND:ARG")
        return
    if case.config.vlan is not None:
        vlan = case.config.vlan
        members = [port for port in others if _carries(case.configs[port.name], vlan)]
        if not members:
            places = ", ".join(f"{port.name} ({_vlans(case.configs[port.name])})" for port in others[:8])
            yield Finding(
                cause="vlan-mismatch",
                message=f"no other port is in VLAN {vlan}: {places}",
                remedy=f"give the others vlan={vlan}, or a trunk that has it",
            )
            return
        others = tuple(members)
    if case.second.status.link == "up" and not any(port.link == "up" for port in others):
        yield Finding(
            cause="alone",
            message=f"no other port is up: {', '.join(f'{port.name} {port.link}' for port in others[:8])}",
            remedy=f"viaduct doctor {others[0].name}",
        )


def _carries(config: PortConfig, vlan: int) -> bool:
    if config.vlan is not None:
        return config.vlan == vlan
    ranges = config.trunk_ranges
    return not ranges or any(first <= vlan <= last for first, last in ranges)


def _vlans(config: PortConfig) -> str:
    return f"vlan={config.vlan}" if config.vlan is not None else f"trunk={config.trunk}" if config.trunk else "all"


def _pollers(case: Case) -> Iterator[Finding]:
    if len(case.first.statistics.pollers) != len(case.second.statistics.pollers):
        return
    pairs: Sequence[tuple[PollerStatistics, PollerStatistics]] = list(
        zip(case.first.statistics.pollers, case.second.statistics.pollers, strict=True)
    )
    seconds = case.second.statistics.time - case.first.statistics.time
    for before, after in pairs:
        load = (after.busy_seconds - before.busy_seconds) / max(seconds, 1e-9)
        if load > OVERLOADED:
            yield Finding(
                cause="poller-overloaded",
                message=f"poller {after.poller} moved frames during {100 * min(load, 1):.0f} % of the time",
                remedy="use more pollers (--pollers 2,3) and queues (queues=2), on CPUs that nobody else uses",
            )


def _permissions(path: str) -> str:
    try:
        state = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    return f"mode {state.st_mode & 0o777:04o}, uid {state.st_uid}, gid {state.st_gid}"


def _ago(case: Case, event: Event) -> str:
    seconds = max(case.now - event.time, 0)
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return f"{clock} ({seconds:.0f} s ago)" if seconds < 600 else f"{clock} ({seconds / 60:.0f} min ago)"
