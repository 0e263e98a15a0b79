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
//! 5. for each receiver, copy its frames from the sender's memory into its buffers, publish them all together, notify it
//!    if it asked for that;
//! 6. give the sender its buffers back, all together.
//!
//! A frame whose receiver has no room stays in the sender's ring for up to [`PATIENCE`], while frames for others overtake
//! it; then it is dropped, and so are those that follow until the receiver makes room. Floods never wait.

use std::time::Duration;

use viaduct_memory::Span;
use viaduct_ring::{Batch, Chain};

use crate::clock;
use crate::counters::{DropReason, QueueCounters};
use crate::fabric::{Fabric, SourceId};
use crate::frame::Frame;
use crate::mac_table::MacKey;
use crate::port::{Input, InputState, Output, OutputQueue, Port};
use crate::sink::{Put, Sink};
use crate::software_offload::SoftwareOffload;

/// Frames taken in one go: one bit each in a word.
pub(crate) const BATCH: usize = 64;

/// How long a frame may wait for a receiver that has no room.
pub(crate) const PATIENCE: Duration = Duration::from_micros(50);

/// Not one receiver but all in the VLAN.
const FLOOD: u32 = u32::MAX;
/// The frame goes nowhere.
const NOWHERE: u32 = u32::MAX - 1;

/// What a round over one source came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing there.
    Idle,
    /// So many frames were dealt with.
    Moved(usize),
    /// Frames are there, and wait for room.
    Waiting,
    /// The source is broken and has to be stopped.
    Broken(String),
}

/// One poller's work space.
#[derive(Debug)]
pub(crate) struct Forwarder {
    batch: Batch,
    frames: Box<[Frame; BATCH]>,
    keys: Box<[(MacKey, MacKey); BATCH]>,
    routes: Box<[u32; BATCH]>,
    offload: SoftwareOffload,
    patience: u64,
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
            keys: Box::new([Default::default(); BATCH]),
            routes: Box::new([0; BATCH]),
            offload: SoftwareOffload::default(),
            patience: clock::in_ticks(PATIENCE),
            broken: Vec::new(),
        }
    }

    /// Takes one batch from `source` through the switch. Never inlined, so that a profiler can count what it costs.
    #[inline(never)]
    pub fn forward(&mut self, fabric: &Fabric, source: SourceId) -> Progress {
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
        let count = match state.input.receive(&mut self.batch, BATCH) {
            Ok(0) => return Progress::Idle,
            Ok(count) => count,
            Err(error) => {
                state.broken = true;
                return Progress::Broken(error);
            }
        };
        if !state.input.is_enabled() {
            slot.counters.drop_frames(DropReason::QueueDisabled, count as u64);
            state.input.release(&self.batch, count);
            return Progress::Moved(count);
        }
        self.warm_up(fabric, state.last_route, count);
        let pending = self.parse(fabric, port, state, &slot.counters, count);
        self.route(fabric, port, pending, &slot.counters, state);
        let had = state.done;
        state.done |= self.deliver(fabric, port, pending);
        self.count(&slot.counters, state.done & pending, had);
        // The frames at the front that are dealt with go back to the sender.
        let finished = (state.done.trailing_ones() as usize).min(count);
        if finished == 0 {
            return Progress::Waiting;
        }
        if state.input.release(&self.batch, finished) {
            slot.counters.notifications.add(1);
        }
        state.done = if finished == 64 { 0 } else { state.done >> finished };
        Progress::Moved(finished)
    }

    /// Sends a frame of our own, virtio-net header first, as if `port` had received it.
    pub fn announce(&mut self, fabric: &Fabric, port: &Port, frame: &mut [u8]) {
        let Some(span) = span_of(frame) else { return };
        self.batch.clear();
        self.batch.spans.push(span);
        self.batch.chains.push(Chain { readable: 1, readable_len: span.len(), ..Chain::default() });
        let (state, counters) = (&mut InputState::default(), &port.inputs[0].counters);
        let pending = self.parse(fabric, port, state, counters, 1);
        self.route(fabric, port, pending, counters, state);
        self.deliver(fabric, port, pending);
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

    /// Parses the frames that are not dealt with yet; returns those that are good.
    #[inline(always)]
    fn parse(
        &mut self,
        fabric: &Fabric,
        port: &Port,
        state: &mut InputState,
        counters: &QueueCounters,
        count: usize,
    ) -> u64 {
        let header_len = state.input.header_len();
        let trusted_flags = state.input.trusted_flags();
        let mut pending = 0;
        for index in 0..count {
            if state.done >> index & 1 == 1 {
                continue;
            }
            let chain = self.batch.chains[index];
            let parsed = Frame::parse(&mut self.batch, &chain, header_len, trusted_flags).and_then(|mut frame| {
                if port.vlan.admit(&mut frame) { Ok(frame) } else { Err(DropReason::VlanDenied) }
            });
            match parsed {
                Ok(frame) => {
                    let keys =
                        (fabric.macs.key(frame.source(), frame.vlan), fabric.macs.key(frame.destination(), frame.vlan));
                    fabric.macs.prefetch(keys.0);
                    fabric.macs.prefetch(keys.1);
                    self.keys[index] = keys;
                    self.frames[index] = frame;
                    pending |= 1 << index;
                }
                Err(reason) => {
                    counters.drop_frames(reason, 1);
                    state.done |= 1 << index;
                }
            }
        }
        if let Some(capture) = &port.capture {
            for index in bits(pending) {
                let frame = &self.frames[index];
                capture.record(&frame.outgoing(&self.batch.spans, frame.tagged), true);
            }
        }
        pending
    }

    /// Learns sources and decides where each frame goes.
    #[inline(always)]
    fn route(&mut self, fabric: &Fabric, port: &Port, pending: u64, counters: &QueueCounters, state: &mut InputState) {
        for index in bits(pending) {
            let frame = &self.frames[index];
            let (source, destination) = self.keys[index];
            if frame.source() & 1 == 1 {
                counters.drop_frames(DropReason::BadSource, 1);
                self.routes[index] = NOWHERE;
                continue;
            }
            fabric.macs.learn(source, port.number);
            self.routes[index] = match fabric.macs.lookup(destination) {
                _ if frame.destination() & 1 == 1 => {
                    if is_reserved_group(frame.destination()) {
                        counters.drop_frames(DropReason::ReservedGroup, 1);
                        NOWHERE
                    } else {
                        FLOOD
                    }
                }
                None => FLOOD,
                Some(number) if number == port.number => {
                    counters.drop_frames(DropReason::NoDestination, 1);
                    NOWHERE
                }
                Some(number) => match fabric.port(number) {
                    Some(receiver) if receiver.vlan.carries(frame.vlan) => {
                        u32::from(number) << 16 | self.choose_queue(receiver, frame)
                    }
                    _ => FLOOD,
                },
            };
            state.last_route = self.routes[index];
        }
    }

    /// The receiver's queue for a frame: the flow's hash spreads flows over queues and keeps each in order.
    #[inline(always)]
    fn choose_queue(&self, receiver: &Port, frame: &Frame) -> u32 {
        match receiver.live.as_slice() {
            [] => 0,
            [only] => u32::from(*only),
            live => u32::from(live[frame.flow_hash(&self.batch.spans) as usize % live.len()]),
        }
    }

    /// Delivers the pending frames, receiver by receiver. Returns those that are dealt with.
    #[inline(always)]
    fn deliver(&mut self, fabric: &Fabric, port: &Port, mut pending: u64) -> u64 {
        let mut done = 0;
        while pending != 0 {
            let route = self.routes[pending.trailing_zeros() as usize];
            let mut group = 0;
            for index in bits(pending) {
                group |= u64::from(self.routes[index] == route) << index;
            }
            pending &= !group;
            done |= match route {
                NOWHERE => group,
                FLOOD => self.flood(fabric, port, group),
                _ => match fabric.port((route >> 16) as u16) {
                    Some(receiver) => self.deliver_to(receiver, route as u16, group, true),
                    None => group,
                },
            };
        }
        done
    }

    /// Sends frames to every other port of their VLAN.
    #[cold]
    fn flood(&mut self, fabric: &Fabric, from: &Port, group: u64) -> u64 {
        let mut reached = 0;
        for receiver in fabric.all().filter(|receiver| receiver.number != from.number) {
            let carried = bits(group)
                .filter(|&index| receiver.vlan.carries(self.frames[index].vlan))
                .fold(0, |carried, index| carried | 1 << index);
            // A port that is down does not miss floods.
            if carried != 0 && !receiver.live.is_empty() {
                self.deliver_to(receiver, receiver.live[0], carried, false);
            }
            reached |= carried;
        }
        let unheard = (group & !reached).count_ones();
        if unheard != 0 {
            from.inputs[0].counters.drop_frames(DropReason::NoDestination, u64::from(unheard));
        }
        group
    }

    /// Delivers the frames of `group` to one queue of one port. Returns those that are dealt with; the others may try
    /// again, if `may_wait`.
    #[inline(always)]
    fn deliver_to(&mut self, receiver: &Port, queue: u16, group: u64, may_wait: bool) -> u64 {
        let Some(slot) = receiver.outputs.get(usize::from(queue)) else { return group };
        let state = &mut *slot.state.lock();
        let counters = &slot.counters;
        let left = match &mut state.output {
            Output::Vhost(sink) => {
                if !sink.is_enabled() {
                    counters.drop_frames(DropReason::LinkDown, u64::from(group.count_ones()));
                    return group;
                }
                let left = self.put_all(&mut **sink, receiver, counters, group);
                if let Some(error) = sink.take_error() {
                    self.broken.push((receiver.number, queue, error));
                    return group;
                }
                left
            }
            Output::Tap(sink) => self.put_all(sink, receiver, counters, group),
            Output::Record(sink) => self.put_all(&mut **sink, receiver, counters, group),
            Output::Null => {
                counters.frames.add(u64::from(group.count_ones()));
                counters.bytes.add(bits(group).map(|index| u64::from(self.frames[index].len)).sum());
                0
            }
            Output::Down => {
                counters.drop_frames(DropReason::LinkDown, u64::from(group.count_ones()));
                0
            }
        };
        if left == 0 {
            state.full_since = 0;
            return group;
        }
        let now = clock::ticks();
        if left != group || state.full_since == 0 {
            state.full_since = now;
        }
        if may_wait && now.wrapping_sub(state.full_since) < self.patience {
            return group & !left;
        }
        counters.drop_frames(DropReason::NoBuffers, u64::from(left.count_ones()));
        group
    }

    /// Puts frames into a sink until there is no more room; returns those that are left.
    #[inline(always)]
    fn put_all<S: Sink>(&mut self, sink: &mut S, receiver: &Port, counters: &QueueCounters, group: u64) -> u64 {
        let Forwarder { batch, frames, offload, .. } = self;
        sink.reserve(group.count_ones() as usize);
        let mut left = group;
        let (mut sent, mut bytes) = (0, 0);
        for index in bits(group) {
            let frame = &frames[index];
            let outgoing = frame.outgoing(&batch.spans, receiver.vlan.tags(frame));
            let verdict = if !receiver.accepts.include(frame.offloads()) {
                counters.completed_offloads.add(1);
                offload.complete_into(sink, &outgoing, receiver.max_frame)
            } else if frame.len > receiver.max_frame && !frame.is_gso() {
                Err(DropReason::TooBig)
            } else {
                match sink.put(&outgoing) {
                    Put::Done => Ok(true),
                    Put::Full => Ok(false),
                    Put::TooBig => Err(DropReason::TooBig),
                    Put::Failed => Err(DropReason::Io),
                }
            };
            match verdict {
                Ok(true) => {
                    sent += 1;
                    bytes += u64::from(outgoing.len);
                    if let Some(capture) = &receiver.capture {
                        capture.record(&outgoing, false);
                    }
                }
                Ok(false) => break,
                Err(reason) => counters.drop_frames(reason, 1),
            }
            left &= !(1 << index);
        }
        if sink.flush() {
            counters.notifications.add(1);
        }
        counters.frames.add(sent);
        counters.bytes.add(bytes);
        left
    }

    /// Counts the frames that have just been dealt with.
    #[inline(always)]
    fn count(&self, counters: &QueueCounters, done: u64, had: u64) {
        let fresh = done & !had;
        counters.frames.add(u64::from(fresh.count_ones()));
        counters.bytes.add(bits(fresh).map(|index| u64::from(self.frames[index].len)).sum());
    }
}

fn output_of(fabric: &Fabric, route: u32) -> Option<&OutputQueue> {
    fabric.port((route >> 16) as u16)?.outputs.get(usize::from(route as u16))
}

/// 01-80-C2-00-00-00 to -0F: for the bridge itself, which speaks none of the protocols there (IEEE 802.1Q, 8.6.3).
#[inline(always)]
fn is_reserved_group(destination: u64) -> bool {
    destination & 0xf0ff_ffff_ffff == 0x0000_00c2_8001
}

/// The memory of `buffer` as a span, for frames that are built here.
pub(crate) fn span_of(buffer: &mut [u8]) -> Option<Span> {
    Some(Span::new(std::ptr::NonNull::new(buffer.as_mut_ptr())?, u32::try_from(buffer.len()).ok()?))
}
