//! A port: the queues of one guest, interface or file, and how frames may pass it.

use std::sync::Arc;

use parking_lot::Mutex;
use viaduct_ring::Batch;

use crate::admission::Admission;
use crate::capture::Capture;
use crate::counters::{Counter, QueueCounters};
use crate::frame::Offloads;
use crate::net_header;
use crate::null::Null;
use crate::pcap::{PcapInput, PcapOutput};
use crate::tap::{TapInput, TapOutput};
use crate::trace::Trace;
use crate::vhost::{VhostInput, VhostOutput};
use crate::vlan::VlanMode;
use crate::waiting::{Company, Patience};

/// Where frames of a queue come from.
#[derive(Debug, Default)]
pub(crate) enum Input {
    /// The queue is not started.
    #[default]
    Stopped,
    Vhost(Box<VhostInput>),
    Tap(Box<TapInput>),
    Replay(Box<PcapInput>),
}

impl Input {
    /// Appends up to `max` waiting frames to the batch; they stay until [`release`](Input::release).
    #[inline(always)]
    pub fn receive(&mut self, batch: &mut Batch, max: usize) -> Result<usize, String> {
        match self {
            Input::Vhost(input) => input.receive(batch, max),
            Input::Tap(input) => input.receive(batch, max),
            Input::Replay(input) => input.receive(batch, max),
            Input::Stopped => Ok(0),
        }
    }

    /// Gives the first `count` frames of the batch back. Returns whether a driver was notified.
    #[inline(always)]
    pub fn release(&mut self, batch: &Batch, count: usize) -> bool {
        match self {
            Input::Vhost(input) => return input.release(&batch.chains[..count]),
            Input::Tap(input) => input.release(count),
            Input::Replay(input) => input.release(count),
            Input::Stopped => {}
        }
        false
    }

    /// Length of the virtio-net header before each frame.
    #[inline(always)]
    pub fn header_len(&self) -> u32 {
        match self {
            Input::Vhost(input) => input.header_len(),
            _ => net_header::NetHeader::LEN as u32,
        }
    }

    /// Header flags that are believed: a guest cannot vouch for a checksum towards another guest, the host's kernel can.
    #[inline(always)]
    pub fn trusted_flags(&self) -> u8 {
        match self {
            Input::Tap(_) => net_header::NEEDS_CSUM | net_header::DATA_VALID,
            _ => net_header::NEEDS_CSUM,
        }
    }

    /// Frames of a disabled queue are taken and discarded.
    #[inline(always)]
    pub fn is_enabled(&self) -> bool {
        match self {
            Input::Vhost(input) => input.is_enabled(),
            _ => true,
        }
    }

    /// Arranges for the poller's epoll to report the next frame. Returns whether there is one already.
    pub fn arm(&mut self) -> bool {
        match self {
            Input::Vhost(input) => input.arm(),
            Input::Replay(input) => input.arm(),
            // Epoll reports edges, and the last read found nothing.
            Input::Tap(_) | Input::Stopped => false,
        }
    }

    /// Ends what [`arm`](Input::arm) began.
    pub fn disarm(&mut self) {
        if let Input::Vhost(input) = self {
            input.disarm();
        }
    }
}

/// Where frames of a queue go.
#[derive(Debug, Default)]
pub(crate) enum Output {
    /// Nobody is there.
    #[default]
    Down,
    Vhost(Box<VhostOutput>),
    Tap(TapOutput),
    Record(Box<PcapOutput>),
    Null(Null),
}

/// The receiving half of a queue pair: frames from the port into the switch.
#[derive(Debug, Default)]
pub(crate) struct InputState {
    pub input: Input,
    /// Which of the frames that have not been released are dealt with: bit 0 is the oldest. A frame that waits for
    /// room holds back the release of those behind it but not their delivery.
    pub done: u64,
    /// Which of them have been counted as received, likewise.
    pub counted: u64,
    /// How many of them, from the oldest on, have been paid for where the port has a rate.
    pub charged: usize,
    /// For whom its frames are, and how long they have waited.
    pub company: Company,
    /// The route of the last frame: probably that of the next.
    pub last_route: u32,
    /// The driver broke its ring, or its memory is gone: not to be touched again before it is restarted.
    pub broken: bool,
}

impl InputState {
    /// The `count` oldest frames went back to the sender.
    #[inline(always)]
    pub fn released(&mut self, count: usize) {
        self.done = self.done.checked_shr(count as u32).unwrap_or(0);
        self.counted = self.counted.checked_shr(count as u32).unwrap_or(0);
        self.charged = self.charged.saturating_sub(count);
    }
}

/// As above, with what can be read without the lock.
#[derive(Debug, Default)]
pub(crate) struct InputQueue {
    /// Taken by the poller to which the queue is assigned, once for each batch.
    pub state: Mutex<InputState>,
    pub counters: QueueCounters,
    /// Times that the driver's notification activated it.
    pub kicks: Counter,
    /// Whose it is.
    pub poller: usize,
}

/// The sending half of a queue pair.
#[derive(Debug, Default)]
pub(crate) struct OutputState {
    pub output: Output,
    /// How long frames may still wait for room.
    pub patience: Patience,
}

/// As above, with what can be read without the lock.
#[derive(Debug, Default)]
pub(crate) struct OutputQueue {
    /// Taken by whoever has frames for it, for the length of a batch.
    pub state: Mutex<OutputState>,
    pub counters: QueueCounters,
}

/// A port of the switch.
#[derive(Debug)]
pub(crate) struct Port {
    pub name: String,
    pub number: u16,
    pub vlan: VlanMode,
    /// What it may do besides, and how fast.
    pub admission: Admission,
    /// Longest frame that may be sent there unsegmented, without tag.
    pub max_frame: u32,
    /// What the receiver accepts.
    pub accepts: Offloads,
    pub inputs: Vec<InputQueue>,
    pub outputs: Vec<OutputQueue>,
    /// Indices of the outputs that can take frames: started and enabled.
    pub live: Vec<u16>,
    pub captures: Vec<Arc<Capture>>,
    pub traces: Vec<Arc<Trace>>,
}
