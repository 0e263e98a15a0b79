"""The counters of a switch as Prometheus wants them (text exposition format 0.0.4).

Theory of operation
-------------------
Nothing is kept here: each scrape copies the counters, which pollers go on writing meanwhile. Names and labels are part
of the interface: whoever made a dashboard of them does not want them to change. Reasons for drops appear for a port
once they have happened there, and in sum over all ports from the start, so that an alert on one that never happened
yet has something to look at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from .status import MacEntry, PollerStatistics, PortStatus, Statistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BATCH_BOUNDS = ("1", "3", "7", "15", "31", "63", "+Inf")
"""The largest batch of each class that pollers count."""


class Measured(Protocol):
    """What of a switch can be measured."""

    def ports(self) -> Sequence[PortStatus]: ...

    def stats(self) -> Statistics: ...

    def macs(self) -> Sequence[MacEntry]: ...

    def event_counts(self) -> Mapping[str, int]: ...


class SwitchCollector:
    """Makes metrics of one switch."""

    def __init__(self, switch: Measured) -> None:
        self.switch = switch

    def collect(self) -> Iterable[Metric]:
        """All metrics of this moment."""
        statistics = self.switch.stats()
        yield from _about(self.switch)
        yield from _ports(statistics, self.switch.ports())
        yield from _pollers(statistics.pollers)


def exposition(switch: Measured) -> bytes:
    """One scrape: everything about the switch and its process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SwitchCollector(switch))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return generate_latest(registry)


def _about(switch: Measured) -> Iterable[Metric]:
    from viaduct import __version__

    build = GaugeMetricFamily("viaduct_build_info", "Always 1; the version is a label.", labels=("version",))
    build.add_metric((__version__,), 1)
    yield build
    yield GaugeMetricFamily("viaduct_stations", "Addresses in the forwarding table.", value=len(switch.macs()))
    events = CounterMetricFamily("viaduct_events", "What happened, by kind.", labels=("kind",))
    for kind, number in sorted(switch.event_counts().items()):
        events.add_metric((kind,), number)
    yield events


def _ports(statistics: Statistics, status: Sequence[PortStatus]) -> Iterable[Metric]:
    from viaduct._core import drop_reasons

    up = GaugeMetricFamily("viaduct_port_up", "Whether frames can pass to the port.", labels=("port", "kind"))
    connected = GaugeMetricFamily("viaduct_port_connected", "Whether a front-end is connected.", labels=("port",))
    for each in status:
        up.add_metric((each.name, each.kind), each.link == "up")
        if each.kind == "vhost-user":
            connected.add_metric((each.name,), each.peer is not None)
    yield up
    yield connected
    labels = ("port", "direction")
    frames = CounterMetricFamily("viaduct_port_frames", "Frames from (received) and to (sent) a port.", labels=labels)
    octets = CounterMetricFamily("viaduct_port_bytes", "Their bytes, without virtio-net headers.", labels=labels)
    notified = CounterMetricFamily("viaduct_port_notifications", "Signals sent to the driver.", labels=labels)
    completed = CounterMetricFamily(
        "viaduct_port_completed_offloads", "Frames whose checksum or segmentation was completed here.", labels=labels
    )
    dropped = CounterMetricFamily("viaduct_port_dropped_frames", "Frames dropped.", labels=(*labels, "reason"))
    total = dict.fromkeys(drop_reasons(), 0)
    for port in statistics.ports:
        for direction in ("received", "sent"):
            at = (port.name, direction)
            queues = [queue for queue in port.queues if queue.direction == direction]
            frames.add_metric(at, sum(queue.frames for queue in queues))
            octets.add_metric(at, sum(queue.bytes for queue in queues))
            notified.add_metric(at, sum(queue.notifications for queue in queues))
            completed.add_metric(at, sum(queue.completed_offloads for queue in queues))
            for reason, number in sorted(port.drops("sent" if direction == "sent" else "received").items()):
                dropped.add_metric((*at, reason), number)
                total[reason] += number
    yield from (frames, octets, notified, completed, dropped)
    drops = CounterMetricFamily(
        "viaduct_dropped_frames", "Frames dropped at the ports there are now.", labels=("reason",)
    )
    for reason, number in total.items():
        drops.add_metric((reason,), number)
    yield drops


def _pollers(pollers: Sequence[PollerStatistics]) -> Iterable[Metric]:
    labels = ("poller", "cpu")
    busy = CounterMetricFamily("viaduct_poller_busy_seconds", "Time in rounds that moved frames.", labels=labels)
    idle = CounterMetricFamily("viaduct_poller_idle_seconds", "Time in rounds that found none.", labels=labels)
    cycles = CounterMetricFamily("viaduct_poller_busy_cycles", "The busy time in processor ticks.", labels=labels)
    frames = CounterMetricFamily("viaduct_poller_frames", "Frames taken from queues.", labels=labels)
    sleeps = CounterMetricFamily("viaduct_poller_sleeps", "Times it went to sleep.", labels=labels)
    wakeups = CounterMetricFamily("viaduct_poller_wakeups", "Sleeps that a frame ended.", labels=labels)
    queues = GaugeMetricFamily("viaduct_poller_queues", "Queues assigned to it.", labels=labels)
    batches = HistogramMetricFamily("viaduct_poller_batch_frames", "Frames in a batch.", labels=labels)
    for poller in pollers:
        at = (str(poller.poller), "" if poller.cpu is None else str(poller.cpu))
        for family, value in (
            (busy, poller.busy_seconds),
            (idle, poller.idle_seconds),
            (cycles, poller.busy_cycles),
            (frames, poller.frames),
            (sleeps, poller.sleeps),
            (wakeups, poller.wakeups),
            (queues, poller.queues),
        ):
            family.add_metric(at, value)
        reached = 0
        buckets: list[tuple[str, float]] = []
        for bound, number in zip(BATCH_BOUNDS, poller.batches, strict=True):
            reached += number
            buckets.append((bound, reached))
        batches.add_metric(at, buckets, sum_value=poller.frames)
    yield from (busy, idle, cycles, frames, sleeps, wakeups, queues, batches)
