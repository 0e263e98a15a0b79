//! Doors for the fuzz targets: a switch without threads, whose rounds the target makes itself, so that an input always does
//! the same. Compiled for them only.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::event::Events;
use crate::fabric::{Fabric, SourceId};
use crate::forward::{Forwarder, Progress};
use crate::mac_table::MacTable;
use crate::pcap::PcapInput;
use crate::poller::PollerLink;
use crate::switch::{Switch, SwitchError};

/// What a round over one source came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Round {
    /// Nothing there, or all that was there is done.
    Done,
    /// Frames wait.
    Waiting,
    /// The source is broken, for this reason.
    Broken(String),
}

/// The work space of the poller that there is not.
#[derive(Debug)]
pub struct Stepper(Forwarder);

impl Default for Stepper {
    fn default() -> Stepper {
        Stepper(Forwarder::new())
    }
}

impl Stepper {
    /// Takes one batch from queue pair `queue` of `port` through the switch.
    pub fn step(&mut self, switch: &Switch, port: u16, queue: u16) -> Round {
        match self.0.forward(&switch.fabric.read(), SourceId { port, queue }) {
            Progress::Idle | Progress::Moved(_) => Round::Done,
            Progress::Broken(message) => Round::Broken(message),
            _ => Round::Waiting,
        }
    }

    /// Outputs found broken since the last call: port, queue pair, and why.
    pub fn broken(&mut self) -> Vec<(u16, u16, String)> {
        std::mem::take(&mut self.0.broken)
    }
}

/// A switch with no poller; `signal` is its eventfd for events.
pub fn switch_without_threads(signal: OwnedFd) -> Result<Switch, SwitchError> {
    let macs = Arc::new(MacTable::new());
    let failed = |error| SwitchError::System("no epoll instance", error);
    Ok(Switch {
        fabric: Arc::new(RwLock::new(Fabric::new(1, macs.clone()))),
        macs,
        links: vec![Arc::new(PollerLink::new().map_err(failed)?)],
        events: Arc::new(Events::new(signal)),
        stop: Arc::default(),
        threads: Vec::new(),
    })
}

/// Reads a capture file to its end or its first damage. Returns how many frames it has and the bytes of the longest.
///
/// # Errors
/// If it is no capture file that can be replayed.
pub fn read_capture(file: File) -> Result<(usize, usize), String> {
    PcapInput::open(file, 0)?.read_all()
}
