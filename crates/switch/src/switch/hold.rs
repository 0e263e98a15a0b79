//! The hand-over of a running switch to another process: this one stops where it stands, that one goes on from there.
//!
//! A switch that is held has no pollers at work and touches no ring. It may be resumed, if the other process does not come
//! up; a new one is held first, so that no frame arrives before all of its receivers are there.

use super::{QueueStats, Switch, SwitchError};
use crate::counters::{Counter, QueueCounters};
use crate::event::Event;
use crate::forward::Forwarder;
use crate::mac_table::MacEntry;
use crate::port::{Input, Output};

/// Where a virtqueue stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePosition {
    /// Port number.
    pub port: u16,
    /// Virtqueue.
    pub index: u16,
    /// As in GET_VRING_BASE.
    pub base: u32,
}

impl Switch {
    /// Stops all pollers at a batch boundary, until [`resume`](Switch::resume). Every frame that was taken up is dealt
    /// with. Returns where the virtqueues stand.
    pub fn hold(&self) -> Vec<QueuePosition> {
        let mut fabric = self.fabric.write();
        if !fabric.held {
            fabric.held = true;
            self.rouse(&mut fabric);
            let mut forwarder = Forwarder::new();
            for &source in fabric.sources.iter().flatten() {
                forwarder.settle(&fabric, source, true);
            }
            for (port, queue, message) in forwarder.broken {
                self.events.push(Event { port, queue: 2 * queue, message });
            }
        }
        let mut positions = Vec::new();
        for port in fabric.all() {
            for (pair, slot) in (0u16..).zip(&port.outputs) {
                if let Output::Vhost(output) = &mut slot.state.lock().output {
                    let base = output.queue().leave();
                    positions.push(QueuePosition { port: port.number, index: 2 * pair, base });
                }
            }
            for (pair, slot) in (0u16..).zip(&port.inputs) {
                if let Input::Vhost(input) = &mut slot.state.lock().input {
                    let base = input.queue().leave();
                    positions.push(QueuePosition { port: port.number, index: 2 * pair + 1, base });
                }
            }
        }
        positions
    }

    /// Lets the pollers go on.
    pub fn resume(&self) {
        let mut fabric = self.fabric.write();
        fabric.held = false;
        self.rouse(&mut fabric);
    }

    /// Adds what an earlier process has counted to a port's counters, by queue pair. Frames must not flow yet.
    pub fn restore_counters(
        &self,
        number: u16,
        received: &[QueueStats],
        sent: &[QueueStats],
    ) -> Result<(), SwitchError> {
        self.with_port(number, |port| {
            for (slot, stats) in port.inputs.iter().zip(received) {
                add(&slot.counters, stats);
            }
            for (slot, stats) in port.outputs.iter().zip(sent) {
                add(&slot.counters, stats);
            }
        })
    }

    /// Puts stations into the forwarding table with their ages.
    pub fn restore_stations(&self, entries: &[MacEntry]) {
        for entry in entries {
            self.macs.restore(entry);
        }
    }

    /// Goes on with the capture file of a port, which replays nothing yet, behind the first `frames` frames.
    pub fn skip_replay(&self, number: u16, frames: u64) -> Result<(), SwitchError> {
        self.with_port(number, |port| {
            for slot in &port.inputs {
                if let Input::Replay(replay) = &mut slot.state.lock().input {
                    replay.skip_to(frames);
                }
            }
        })
    }

    /// How many frames of its capture file a port has replayed.
    pub fn replayed(&self, number: u16) -> Result<u64, SwitchError> {
        self.with_port(number, |port| {
            port.inputs.first().map_or(0, |slot| match &slot.state.lock().input {
                Input::Replay(replay) => replay.taken(),
                _ => 0,
            })
        })
    }
}

fn add(counters: &QueueCounters, stats: &QueueStats) {
    counters.frames.add(stats.frames);
    counters.bytes.add(stats.bytes);
    for (counter, count) in counters.drops.iter().zip(&stats.drops) {
        Counter::add(counter, *count);
    }
    counters.notifications.add(stats.notifications);
    counters.completed_offloads.add(stats.completed_offloads);
}
