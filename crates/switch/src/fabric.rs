//! The switch as its pollers see it.
//!
//! Pollers hold a read guard for as long as they forward and yield it to a waiting writer between two rounds, so the
//! control side changes anything here with all pollers stopped at a batch boundary, for microseconds, and needs no
//! further protocol with them. What changes while frames flow (rings, counters, the forwarding table) has interior
//! mutability of its own.

use std::sync::Arc;

use crate::mac_table::{MAX_PORTS, MacTable};
use crate::port::Port;

/// An input of a port, as pollers know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SourceId {
    pub port: u16,
    pub queue: u16,
}

impl SourceId {
    /// As an epoll token.
    pub fn token(self) -> u64 {
        u64::from(self.port) << 16 | u64::from(self.queue)
    }

    /// The inverse.
    pub fn from_token(token: u64) -> SourceId {
        SourceId { port: (token >> 16) as u16, queue: token as u16 }
    }
}

/// Ports, forwarding table, and who polls what.
#[derive(Debug)]
pub(crate) struct Fabric {
    /// By number.
    pub ports: Vec<Option<Box<Port>>>,
    pub macs: Arc<MacTable>,
    /// For each poller, the started inputs assigned to it.
    pub sources: Vec<Vec<SourceId>>,
    /// Counts changes of `sources`, and of `held`.
    pub generation: u64,
    /// Nothing is to be polled.
    pub held: bool,
}

impl Fabric {
    pub fn new(pollers: usize, macs: Arc<MacTable>) -> Fabric {
        Fabric { ports: Vec::new(), macs, sources: vec![Vec::new(); pollers], generation: 1, held: false }
    }

    #[inline(always)]
    pub fn port(&self, number: u16) -> Option<&Port> {
        self.ports.get(usize::from(number))?.as_deref()
    }

    /// The ports there are.
    pub fn all(&self) -> impl Iterator<Item = &Port> {
        self.ports.iter().flatten().map(|port| &**port)
    }

    /// A number that no port has, if any is left.
    pub fn free_number(&self) -> Option<u16> {
        let free = self.ports.iter().position(Option::is_none).unwrap_or(self.ports.len());
        (free < MAX_PORTS).then_some(free as u16)
    }
}
