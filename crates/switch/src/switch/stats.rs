//! Counters, copied while frames flow.

use std::sync::atomic::Ordering::Relaxed;

use super::Switch;
use crate::counters::QueueCounters;
use crate::poller_counters::PollerCounters;
use crate::port::Port;

/// A queue's counters, copied.
#[derive(Clone, Debug, Default)]
pub struct QueueStats {
    /// See [`QueueCounters`].
    pub frames: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// By [`DropReason`](crate::counters::DropReason).
    pub drops: Vec<u64>,
    /// Notifications sent to the driver.
    pub notifications: u64,
    /// Offloads completed here.
    pub completed_offloads: u64,
}

impl QueueStats {
    fn read(counters: &QueueCounters) -> QueueStats {
        QueueStats {
            frames: counters.frames.get(),
            bytes: counters.bytes.get(),
            drops: counters.drops.iter().map(|counter| counter.get()).collect(),
            notifications: counters.notifications.get(),
            completed_offloads: counters.completed_offloads.get(),
        }
    }
}

/// A port's counters, copied.
#[derive(Clone, Debug, Default)]
pub struct PortStats {
    /// Port number.
    pub number: u16,
    /// Its name.
    pub name: String,
    /// Frames can be delivered to it.
    pub up: bool,
    /// From the port into the switch, by queue pair.
    pub received: Vec<QueueStats>,
    /// From the switch to the port, by queue pair.
    pub sent: Vec<QueueStats>,
}

/// A poller's counters, copied.
#[derive(Clone, Debug, Default)]
pub struct PollerStats {
    /// Ticks in rounds that moved frames.
    pub busy_ticks: u64,
    /// Ticks in rounds that found nothing.
    pub idle_ticks: u64,
    /// Rounds.
    pub rounds: u64,
    /// Frames taken.
    pub frames: u64,
    /// Batches by size class, see [`BATCH_CLASSES`](crate::poller_counters::BATCH_CLASSES).
    pub batches: Vec<u64>,
    /// Times asleep.
    pub sleeps: u64,
    /// Times woken by a frame.
    pub wakeups: u64,
    /// Inputs being polled.
    pub active: u64,
    /// Inputs assigned.
    pub sources: usize,
}

impl PollerStats {
    fn read(counters: &PollerCounters, sources: usize) -> PollerStats {
        PollerStats {
            busy_ticks: counters.busy_ticks.get(),
            idle_ticks: counters.idle_ticks.get(),
            rounds: counters.rounds.get(),
            frames: counters.frames.get(),
            batches: counters.batches.iter().map(|counter| counter.get()).collect(),
            sleeps: counters.sleeps.get(),
            wakeups: counters.wakeups.get(),
            active: counters.active.load(Relaxed),
            sources,
        }
    }
}

impl Switch {
    /// Counters of all ports.
    pub fn port_stats(&self) -> Vec<PortStats> {
        let fabric = self.fabric.read();
        let read = |port: &Port| PortStats {
            number: port.number,
            name: port.name.clone(),
            up: !port.live.is_empty(),
            received: port.inputs.iter().map(|slot| QueueStats::read(&slot.counters)).collect(),
            sent: port.outputs.iter().map(|slot| QueueStats::read(&slot.counters)).collect(),
        };
        fabric.all().map(read).collect()
    }

    /// Counters of all pollers.
    pub fn poller_stats(&self) -> Vec<PollerStats> {
        let fabric = self.fabric.read();
        let pollers = self.links.iter().zip(&fabric.sources);
        pollers.map(|(link, sources)| PollerStats::read(&link.counters, sources.len())).collect()
    }
}
