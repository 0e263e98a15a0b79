//! A look at the next packets of a port as they stand in its rings: descriptors, headers, and what became of them.
//!
//! A port that is not traced pays one look at an empty list for each batch. One that is pays for what is shown, and only
//! until as many packets as were asked for have been.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use viaduct_memory::Span;
use viaduct_ring::DescriptorView;

/// Bytes that are kept of each packet, virtio-net header included.
const SNAP: usize = 256;

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Put into a receive queue of the port that is traced.
    Written,
    /// Offered to one queue of one port, by number. What that had no room for is counted there.
    Forwarded(u16, u16),
    /// Sent to every other port of the VLAN.
    Flooded,
    /// Went nowhere, for the reason of this name.
    Dropped(&'static str),
}

/// A packet that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedPacket {
    /// Nanoseconds since 1970.
    pub time: u64,
    /// Virtqueue (virtio 1.2, 5.1.2).
    pub queue: u16,
    /// Place in the available or packed ring.
    pub position: u16,
    /// Head of the chain, or buffer id.
    pub id: u16,
    /// None for ports that have no rings.
    pub descriptors: Vec<DescriptorView>,
    /// Length of the virtio-net header with which `data` begins.
    pub header_len: u32,
    /// The whole packet's length, header included; of a written one, that of the buffers that it was put into.
    pub len: u32,
    /// Its first bytes.
    pub data: Vec<u8>,
    /// What became of it.
    pub outcome: Outcome,
}

#[derive(Debug)]
struct Waiting {
    packets: Vec<TracedPacket>,
    left: usize,
}

/// A trace in progress.
#[derive(Debug)]
pub struct Trace {
    waiting: Mutex<Waiting>,
    signal: std::fs::File,
}

impl Trace {
    /// Keeps the next `count` packets; `signal` is an eventfd that is written when some wait.
    pub fn new(count: usize, signal: OwnedFd) -> Trace {
        Trace { waiting: Mutex::new(Waiting { packets: Vec::new(), left: count }), signal: signal.into() }
    }

    /// Takes what waits, oldest first.
    pub fn take(&self) -> Vec<TracedPacket> {
        std::mem::take(&mut self.waiting.lock().packets)
    }

    /// How many more are wanted.
    pub(crate) fn wanted(&self) -> usize {
        self.waiting.lock().left
    }

    pub(crate) fn record(&self, packet: TracedPacket) {
        let mut waiting = self.waiting.lock();
        if waiting.left == 0 {
            return;
        }
        waiting.left -= 1;
        waiting.packets.push(packet);
        drop(waiting);
        let _ = (&self.signal).write(&1u64.to_ne_bytes());
    }
}

/// Now, in nanoseconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// The first bytes of what lies in `spans`.
///
/// # Safety
/// The memory of the spans is alive.
pub(crate) unsafe fn first_bytes(spans: &[Span], most: usize) -> Vec<u8> {
    let mut data = Vec::new();
    for span in spans {
        let len = (span.len() as usize).min(most.min(SNAP) - data.len());
        let start = data.len();
        data.resize(start + len, 0);
        // SAFETY: alive, says the caller; the range is not longer than the span.
        unsafe { span.read(0, &mut data[start..]) };
    }
    data
}
