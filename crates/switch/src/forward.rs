//! The way of a packet.
//!
//! # Theory of operation
//!
//! [`Forwarder::forward`] takes one batch through the switch. Each step runs over the whole batch before the next one
//! begins, so that the cache misses of one frame are under way while others are worked on:
//!
//! 1. look at a batch of chains of the sender's ring and fetch the first lines of their buffers;
//! 2. look at as many buffers of the probable receiver and fetch those for writing;
//! 3. parse: virtio-net header and the first 16 bytes of each frame are read once, checked, and kept; fetch the lines of
//!    the forwarding table;
//! 4. learn the source, look up the destination;
//! 5. for each receiver, copy its frames from the sender's memory into its buffers;
//! 6. give the sender its buffers back, all together; then show each receiver its frames, all together, and notify it if
//!    it asked for that.
//!
//! This file has steps 1, 2 and 6; [`parse`] has step 3, [`route`] step 4 and [`deliver`] step 5. Nearly all frames are *plain*:
//! in one piece, untagged, with nothing left to be done to them. Those take a short way through each step.
//!
//! A frame whose receiver has no room stays in the sender's ring for a while, and frames for others overtake it; then it is
//! dropped, and so are those that follow until the receiver makes room. [`waiting`](crate::waiting) says how long.

mod deliver;
mod parse;
mod route;
mod settle;
mod trace;

use viaduct_memory::Span;
use viaduct_ring::{Batch, Chain};

use crate::clock;
use crate::counters::{DropReason, QueueCounters};
use crate::fabric::{Fabric, SourceId};
use crate::frame::Frame;
use crate::mac_table::MacKey;
use crate::policer::Grant;
use crate::port::{Input, InputState, Output, OutputQueue, Port};
use crate::sink::Sink;
use crate::software_offload::SoftwareOffload;
use crate::turns;
use crate::waiting::Bounds;

/// Frames taken in one go: one bit each in a word.
pub(crate) const BATCH: usize = 64;

/// What a round over one source came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing there.
    Idle,
    /// So many frames were dealt with.
    Moved(usize),
    /// Frames are there, and wait for room.
    Waiting,
    /// Frames are there, and the port may not send them before that many ticks have passed.
    Throttled(u64),
    /// The source is broken and has to be stopped.
    Broken(String),
}

/// One poller's work space.
#[derive(Debug)]
pub(crate) struct Forwarder {
    batch: Batch,
    frames: Box<[Frame; BATCH]>,
    /// Keys of the source addresses, and of the destinations, where they differ from those of the frame before.
    sources: Box<[MacKey; BATCH]>,
    destinations: Box<[MacKey; BATCH]>,
    routes: Box<[u32; BATCH]>,
    /// Frames with the addresses and VLAN of the one before, and so its route.
    like_before: u64,
    /// Others that have its destination and VLAN.
    same_destination: u64,
    /// Frames that are plain, and the length of the longest of those.
    plain: u64,
    longest: u32,
    /// All pending frames have the same route, which stands at the first of them.
    one_route: bool,
    offload: SoftwareOffload,
    bounds: Bounds,
    /// What the visit has cost so far, see [`turns`](crate::turns), and whether it has left frames that could go on.
    cost: u64,
    more: bool,
    /// Outputs, by port and queue, that have frames which their receivers do not see yet.
    unseen: Vec<(u16, u16)>,
    /// Outputs found broken in this round.
    pub broken: Vec<(u16, u16, String)>,
}

/// The bits of a word, lowest first.
#[inline(always)]
fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let bit = word.trailing_zeros() as usize;
        word &= word - 1;
        Some(bit)
    })
}

impl Forwarder {
    pub fn new() -> Forwarder {
        Forwarder {
            batch: Batch::with_capacity(BATCH),
            frames: Box::new([Frame::default(); BATCH]),
            sources: Box::new([MacKey::default(); BATCH]),
            destinations: Box::new([MacKey::default(); BATCH]),
            routes: Box::new([0; BATCH]),
            like_before: 0,
            same_destination: 0,
            plain: 0,
            longest: 0,
            one_route: false,
            offload: SoftwareOffload::default(),
            bounds: Bounds::new(),
            cost: 0,
            more: false,
            unseen: Vec::with_capacity(BATCH),
            broken: Vec::new(),
        }
    }

    /// Takes one batch from `source` through the switch. Never inlined, so that a profiler can count what it costs.
    #[inline(never)]
    pub fn forward(&mut self, fabric: &Fabric, source: SourceId) -> Progress {
        self.forward_up_to(fabric, source, BATCH)
    }

    #[inline(always)]
    fn forward_up_to(&mut self, fabric: &Fabric, source: SourceId, max: usize) -> Progress {
        let Some(port) = fabric.port(source.port) else { return Progress::Idle };
        let Some(slot) = port.inputs.get(usize::from(source.queue)) else { return Progress::Idle };
        let state = &mut *slot.state.lock();
        if state.broken {
            return Progress::Idle;
        }
        if let Input::Replay(replay) = &mut state.input {
            // A recording begins when there is someone to hear it.
            replay.started |= fabric.all().any(|other| other.number != port.number && !other.live.is_empty());
        }
        self.batch.clear();
        let mut count = match state.input.receive(&mut self.batch, max) {
            Ok(0) => return Progress::Idle,
            Ok(count) => count,
            Err(error) => {
                state.broken = true;
                return Progress::Broken(error);
            }
        };
        if !state.input.is_enabled() {
            // Frames that overtook a waiting one have been delivered.
            let undone = (u64::MAX >> (BATCH - count)) & !state.done;
            slot.counters.drop_frames(DropReason::QueueDisabled, u64::from(undone.count_ones()));
            if state.input.release(&self.batch, count) {
                slot.counters.notifications.add(1);
            }
            state.released(count);
            return Progress::Moved(count);
        }
        self.more = count == BATCH;
        if self.batch.chains.iter().map(|chain| u64::from(chain.readable_len)).sum::<u64>() > turns::VISIT {
            count = self.cut(state.done);
        }
        if state.company.is_waiting() {
            state.company.end_wait(clock::ticks());
        }
        if let Some(shaper) = &port.admission.shaper {
            match shaper.grant(&self.batch.chains, state.input.header_len(), &mut state.charged, clock::ticks()) {
                Grant::Frames(granted) => count = granted,
                Grant::In(ticks) => return Progress::Throttled(ticks),
            }
            self.batch.chains.truncate(count);
            self.more = false;
        }
        self.warm_up(fabric, state.last_route, count);
        let pending = self.parse(fabric, port, state, &slot.counters);
        self.route(fabric, port, pending, state);
        state.done |= self.deliver(fabric, port, &slot.counters, pending, &mut state.company);
        // The frames at the front that are dealt with go back to the sender.
        let finished = (state.done.trailing_ones() as usize).min(count);
        if finished != 0 {
            if !port.traces.is_empty() {
                self.trace(fabric, port, source.queue, state, pending, finished);
            }
            if state.input.release(&self.batch, finished) {
                slot.counters.notifications.add(1);
            }
            state.released(finished);
        }
        self.show(fabric);
        if finished == 0 { Progress::Waiting } else { Progress::Moved(finished) }
    }

    /// What the last visit has cost, and whether the source has more that could go on.
    #[inline(always)]
    pub fn take_cost(&mut self) -> (u64, bool) {
        (std::mem::take(&mut self.cost) + turns::SPAN * self.batch.spans.len() as u64, self.more)
    }

    /// Leaves what is more than one visit may take for the next. Returns how many frames remain in the batch.
    #[cold]
    fn cut(&mut self, done: u64) -> usize {
        let mut bytes = 0;
        let fits = |(index, chain): &(usize, &Chain)| {
            let more = bytes < turns::VISIT;
            bytes += if done >> index & 1 == 0 { u64::from(chain.readable_len) } else { 0 };
            more
        };
        let count = self.batch.chains.iter().enumerate().take_while(fits).count();
        self.more |= count < self.batch.chains.len();
        self.batch.chains.truncate(count);
        count
    }

    /// Sends a frame of our own, virtio-net header first, as if `port` had received it.
    pub fn announce(&mut self, fabric: &Fabric, port: &Port, frame: &mut [u8]) {
        let Some(span) = span_of(frame) else { return };
        self.batch.clear();
        self.batch.spans.push(span);
        self.batch.chains.push(Chain { readable: 1, readable_len: span.len(), ..Chain::default() });
        // The port's counters belong to the poller that serves it, and this is not what its guest sent.
        let (state, counters) = (&mut InputState::default(), &QueueCounters::default());
        let pending = self.parse(fabric, port, state, counters);
        self.route(fabric, port, pending, state);
        self.deliver(fabric, port, counters, pending, &mut state.company);
        self.show(fabric);
    }

    /// Fetches the buffers of the receiver that had the last frame.
    #[inline(always)]
    fn warm_up(&mut self, fabric: &Fabric, route: u32, count: usize) {
        if let Some(output) = output_of(fabric, route)
            && let Output::Vhost(sink) = &mut output.state.lock().output
            && sink.is_enabled()
        {
            sink.reserve(count);
        }
    }
}

fn output_of(fabric: &Fabric, route: u32) -> Option<&OutputQueue> {
    fabric.port((route >> 16) as u16)?.outputs.get(usize::from(route as u16))
}

/// The memory of `buffer` as a span, for frames that are built here.
pub(crate) fn span_of(buffer: &mut [u8]) -> Option<Span> {
    Some(Span::new(std::ptr::NonNull::new(buffer.as_mut_ptr())?, u32::try_from(buffer.len()).ok()?))
}

#[cfg(test)]
mod tests;
