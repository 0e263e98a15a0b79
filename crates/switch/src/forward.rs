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
use crate::frame::{Frame, Outgoing};
use crate::mac_table::MacKey;
use crate::port::{Input, InputState, Output, OutputQueue, Port};
use crate::sink::{Put, Sink};
use crate::software_offload::SoftwareOffload;

/// Frames taken in one go: one bit each in a word.
pub(crate) const BATCH: usize = 64;

/// How long a frame may wait for a receiver that has no room.
pub(crate) const PATIENCE: Duration = Duration::from_micros(50);

/// A route is a port in the upper half and one of its queues in the lower; this instead of a queue: to be chosen for
/// each flow.
const SPREAD: u32 = 0x8000;
const PORT: u32 = 0xffff_0000;
/// Not one receiver but all in the VLAN. Ports are numbered below this.
const FLOOD: u32 = 0xfff0_0000;
/// The frame goes nowhere, for the [`DropReason`] of this number.
const NOWHERE: u32 = 0xfff1_0000;

fn nowhere(reason: DropReason) -> u32 {
    NOWHERE + reason as u32
}

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
    /// Frames with the addresses and VLAN of the one before, and so its route.
    like_before: u64,
    /// All pending frames have the same route.
    one_route: bool,
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
            like_before: 0,
            one_route: false,
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
            // Frames that overtook a waiting one have been delivered.
            let undone = (u64::MAX >> (BATCH - count)) & !state.done;
            slot.counters.drop_frames(DropReason::QueueDisabled, u64::from(undone.count_ones()));
            if state.input.release(&self.batch, count) {
                slot.counters.notifications.add(1);
            }
            state.released(count);
            return Progress::Moved(count);
        }
        self.warm_up(fabric, state.last_route, count);
        let pending = self.parse(fabric, port, state, &slot.counters);
        self.route(fabric, port, pending, state);
        state.done |= self.deliver(fabric, port, &slot.counters, pending);
        // The frames at the front that are dealt with go back to the sender.
        let finished = (state.done.trailing_ones() as usize).min(count);
        if finished == 0 {
            return Progress::Waiting;
        }
        if state.input.release(&self.batch, finished) {
            slot.counters.notifications.add(1);
        }
        state.released(finished);
        Progress::Moved(finished)
    }

    /// Sends a frame of our own, virtio-net header first, as if `port` had received it.
    pub fn announce(&mut self, fabric: &Fabric, port: &Port, frame: &mut [u8]) {
        let Some(span) = span_of(frame) else { return };
        self.batch.clear();
        self.batch.spans.push(span);
        self.batch.chains.push(Chain { readable: 1, readable_len: span.len(), ..Chain::default() });
        let (state, counters) = (&mut InputState::default(), &port.inputs[0].counters);
        let pending = self.parse(fabric, port, state, counters);
        self.route(fabric, port, pending, state);
        self.deliver(fabric, port, counters, pending);
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
    fn parse(&mut self, fabric: &Fabric, port: &Port, state: &mut InputState, counters: &QueueCounters) -> u64 {
        let header_len = state.input.header_len();
        let trusted_flags = state.input.trusted_flags();
        let Forwarder { batch: Batch { chains, spans }, frames, keys, .. } = self;
        let (mut pending, mut like_before, mut bytes) = (0u64, 0u64, 0u64);
        let mut before = Frame::default();
        for (index, (chain, frame)) in chains.iter().zip(frames.iter_mut()).enumerate() {
            if state.done >> index & 1 == 1 {
                continue;
            }
            let mut verdict = frame.parse(spans, chain, header_len, trusted_flags);
            if verdict.is_ok() && !port.vlan.admit(frame) {
                verdict = Err(DropReason::VlanDenied);
            }
            if let Err(reason) = verdict {
                counters.drop_frames(reason, 1);
                state.done |= 1 << index;
                continue;
            }
            if pending != 0 && frame.goes_with(&before) {
                like_before |= 1 << index;
            } else {
                before = *frame;
                let key =
                    (fabric.macs.key(frame.source(), frame.vlan), fabric.macs.key(frame.destination(), frame.vlan));
                fabric.macs.prefetch(key.0);
                fabric.macs.prefetch(key.1);
                keys[index] = key;
            }
            pending |= 1 << index;
            bytes += u64::from(frame.len);
        }
        let fresh = pending & !state.counted;
        if fresh != pending {
            bytes = bits(fresh).map(|index| u64::from(frames[index].len)).sum();
        }
        state.counted |= pending;
        counters.frames.add(u64::from(fresh.count_ones()));
        counters.bytes.add(bytes);
        for capture in &port.captures {
            for frame in bits(fresh).map(|index| &frames[index]) {
                capture.record(&frame.outgoing(spans, frame.tagged), true);
            }
        }
        self.like_before = like_before;
        pending
    }

    /// Learns sources and decides where each frame goes.
    #[inline(always)]
    fn route(&mut self, fabric: &Fabric, port: &Port, pending: u64, state: &mut InputState) {
        let mut route = 0;
        let mut distinct = 0;
        for index in bits(pending) {
            if self.like_before >> index & 1 == 0 {
                let next = self.route_one(fabric, port, index);
                distinct += u32::from(next != route || distinct == 0);
                route = next;
            }
            // The flow may choose another queue of the same port.
            self.routes[index] = if route & SPREAD == 0 { route } else { self.spread(fabric, route, index) };
        }
        self.one_route = distinct == 1 && route & SPREAD == 0;
        state.last_route = route;
    }

    #[inline(always)]
    fn route_one(&self, fabric: &Fabric, port: &Port, index: usize) -> u32 {
        let frame = &self.frames[index];
        let (source, destination) = self.keys[index];
        if frame.source() & 1 == 1 {
            return nowhere(DropReason::BadSource);
        }
        fabric.macs.learn(source, port.number);
        if frame.destination() & 1 == 1 {
            return if is_reserved_group(frame.destination()) { nowhere(DropReason::ReservedGroup) } else { FLOOD };
        }
        let Some(number) = fabric.macs.lookup(destination) else { return FLOOD };
        if number == port.number {
            return nowhere(DropReason::NoDestination);
        }
        match fabric.port(number) {
            Some(receiver) if receiver.vlan.carries(frame.vlan) => {
                let port = u32::from(number) << 16;
                match receiver.live.as_slice() {
                    [] => port,
                    [only] => port | u32::from(*only),
                    _ => port | SPREAD,
                }
            }
            _ => FLOOD,
        }
    }

    /// The receiver's queue for a frame: the flow's hash spreads flows over queues and keeps each in order.
    #[inline(never)]
    fn spread(&self, fabric: &Fabric, route: u32, index: usize) -> u32 {
        let port = route & PORT;
        let live = fabric.port((port >> 16) as u16).map_or(&[][..], |receiver| &receiver.live);
        let hash = self.frames[index].flow_hash(&self.batch.spans) as usize;
        port | live.get(hash % live.len().max(1)).map_or(0, |queue| u32::from(*queue))
    }

    /// Delivers the pending frames, receiver by receiver. Returns those that are dealt with.
    #[inline(always)]
    fn deliver(&mut self, fabric: &Fabric, port: &Port, counters: &QueueCounters, mut pending: u64) -> u64 {
        let mut done = 0;
        while pending != 0 {
            let route = self.routes[pending.trailing_zeros() as usize];
            let group = self.group(route, pending);
            pending &= !group;
            done |= match route {
                FLOOD => self.flood(fabric, port, counters, group),
                NOWHERE.. => {
                    let reason = DropReason::ALL[(route - NOWHERE) as usize % DropReason::ALL.len()];
                    counters.drop_frames(reason, u64::from(group.count_ones()));
                    group
                }
                _ => match fabric.port((route >> 16) as u16) {
                    Some(receiver) => self.deliver_to(receiver, route as u16, group, true),
                    None => group,
                },
            };
        }
        done
    }

    /// The pending frames with this route.
    #[inline(always)]
    fn group(&self, route: u32, pending: u64) -> u64 {
        if self.one_route {
            return pending;
        }
        bits(pending).fold(0, |group, index| group | u64::from(self.routes[index] == route) << index)
    }

    /// Sends frames to every other port of their VLAN.
    #[cold]
    fn flood(&mut self, fabric: &Fabric, from: &Port, counters: &QueueCounters, group: u64) -> u64 {
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
            counters.drop_frames(DropReason::NoDestination, u64::from(unheard));
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
                let left = if sink.is_enabled() { self.put_all(&mut **sink, receiver, counters, group) } else { group };
                // Also what was found before, when the buffers were fetched.
                if let Some(error) = sink.take_error() {
                    self.broken.push((receiver.number, queue, error));
                }
                if !sink.is_enabled() {
                    counters.drop_frames(DropReason::LinkDown, u64::from(left.count_ones()));
                    return group;
                }
                left
            }
            Output::Tap(sink) => self.put_all(sink, receiver, counters, group),
            Output::Record(sink) => self.put_all(&mut **sink, receiver, counters, group),
            Output::Null(sink) => self.put_all(sink, receiver, counters, group),
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
            let tag_out = receiver.vlan.tags(frame);
            let accepted = receiver.accepts.include(frame.offloads());
            let put = if !accepted || frame.len > receiver.max_frame {
                put_unusual(sink, receiver, counters, offload, frame, &frame.outgoing(&batch.spans, tag_out))
            } else if frame.is_simple(tag_out) {
                sink.put_simple(frame, batch.spans[frame.first as usize])
            } else {
                sink.put(&frame.outgoing(&batch.spans, tag_out))
            };
            match put {
                Put::Done => {
                    sent += 1;
                    bytes += u64::from(frame.len);
                    for capture in &receiver.captures {
                        capture.record(&frame.outgoing(&batch.spans, tag_out), false);
                    }
                }
                Put::Full => break,
                Put::TooBig => counters.drop_frames(DropReason::TooBig, 1),
                Put::Failed(reason) => counters.drop_frames(reason, 1),
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
}

/// Puts a frame into a sink that does not take it as it is: offloads are completed, and too long frames refused.
#[inline(never)]
fn put_unusual<S: Sink>(
    sink: &mut S,
    receiver: &Port,
    counters: &QueueCounters,
    offload: &mut SoftwareOffload,
    frame: &Frame,
    outgoing: &Outgoing,
) -> Put {
    if !receiver.accepts.include(frame.offloads()) {
        let put = offload.complete_into(sink, outgoing, receiver.max_frame);
        // A checksum that was verified needs no work, only to be kept to ourselves.
        if put == Put::Done && frame.is_unfinished() {
            counters.completed_offloads.add(1);
        }
        return put;
    }
    if frame.is_gso() || frame.untagged_len() <= receiver.max_frame { sink.put(outgoing) } else { Put::TooBig }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use viaduct_memory::{GuestMemory, RegionCache};
    use viaduct_ring::{DeviceQueue, DriverQueue, Layout, QueueConfig};

    use super::*;
    use crate::frame::Offloads;
    use crate::mac_table::MacTable;
    use crate::net_header::{self, NetHeader};
    use crate::null::Null;
    use crate::port::{InputQueue, OutputState};
    use crate::vhost::{VhostInput, VhostOutput, VhostQueue};
    use crate::vlan::VlanMode;

    fn queue() -> (GuestMemory, DriverQueue, VhostQueue) {
        let memory = GuestMemory::allocate(1 << 20).expect("memory");
        let config = QueueConfig {
            layout: Layout::Split,
            size: 16,
            descriptor_addr: 0,
            driver_addr: 0x1000,
            device_addr: 0x2000,
            base: 0,
            event_idx: false,
            indirect: false,
            in_order: false,
        };
        let queue = DeviceQueue::new(memory.clone(), &config).expect("a legal queue");
        let driver = DriverQueue::new(memory.clone(), &config).expect("a legal queue");
        let queue = VhostQueue { queue, kick: None, call: None, enabled: true, header_len: 12, mergeable: true };
        (memory, driver, queue)
    }

    fn port(number: u16, input: Input, output: Output) -> Option<Box<Port>> {
        let input = Mutex::new(InputState { input, ..InputState::default() });
        let output = Mutex::new(OutputState { output, full_since: 0 });
        Some(Box::new(Port {
            name: String::new(),
            number,
            vlan: VlanMode::All,
            max_frame: u32::MAX,
            accepts: Offloads::NONE,
            inputs: vec![InputQueue { state: input, ..InputQueue::default() }],
            outputs: vec![OutputQueue { state: output, ..OutputQueue::default() }],
            live: vec![0],
            captures: Vec::new(),
        }))
    }

    #[test]
    fn a_queue_disabled_while_a_frame_waits_starts_afresh() {
        let (memory, mut driver, sender) = queue();
        let (_, _, full) = queue();
        let macs = Arc::new(MacTable::new());
        let mut fabric = Fabric::new(1, macs.clone());
        fabric.ports = vec![
            port(0, Input::Vhost(Box::new(VhostInput::new(sender))), Output::Down),
            port(1, Input::Stopped, Output::Vhost(Box::new(VhostOutput::new(full)))),
            port(2, Input::Stopped, Output::Null(Null)),
        ];
        let address = |station: u8| [2, 0, 0, 0, 0, station];
        for station in [1, 2] {
            let [a, b, c, d, e, f] = address(station);
            macs.learn(macs.key(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), 0), station.into());
        }
        let mut send = |station: u8| {
            let frame = [&[0; 12][..], &address(station), &address(9), &[0; 48]].concat();
            let at = 0x10000 + 0x100 * u64::from(station);
            let span = memory.translate(&mut RegionCache::default(), at, frame.len() as u32).expect("in memory");
            // SAFETY: `memory` is alive.
            unsafe { span.write(0, &frame) };
            assert!(driver.add(&[(at, frame.len() as u32)], &[], 0).expect("a legal chain"));
            driver.publish();
        };
        let mut forwarder = Forwarder::new();
        forwarder.patience = u64::MAX;
        let source = SourceId { port: 0, queue: 0 };
        let enable = |fabric: &Fabric, enabled| {
            if let Input::Vhost(input) = &mut fabric.port(0).expect("there").inputs[0].state.lock().input {
                input.set_enabled(enabled);
            }
        };
        let swallowed = |fabric: &Fabric| fabric.port(2).expect("there").outputs[0].counters.frames.get();

        send(1);
        send(2);
        assert_eq!(forwarder.forward(&fabric, source), Progress::Waiting);
        assert_eq!(swallowed(&fabric), 1, "the second overtakes the first");
        enable(&fabric, false);
        assert_eq!(forwarder.forward(&fabric, source), Progress::Moved(2));
        let dropped = &fabric.port(0).expect("there").inputs[0].counters.drops[DropReason::QueueDisabled as usize];
        assert_eq!(dropped.get(), 1, "one of them was delivered");
        enable(&fabric, true);
        send(2);
        send(2);
        assert_eq!(forwarder.forward(&fabric, source), Progress::Moved(2));
        assert_eq!(swallowed(&fabric), 3);
    }

    #[test]
    fn a_receiver_without_checksum_offload_is_not_told_of_checksums() {
        // A socket in place of an interface: each message is a frame.
        let (near, far) = std::os::unix::net::UnixDatagram::pair().expect("sockets");
        let (input, _) = crate::tap::open(near.into()).expect("it can be made non-blocking");
        let (memory, mut driver, receiver) = queue();
        driver.add(&[], &[(0x10000, 2048)], 0).expect("a legal buffer");
        driver.publish();
        let mut fabric = Fabric::new(1, Arc::new(MacTable::new()));
        fabric.ports = vec![
            port(0, Input::Tap(Box::new(input)), Output::Down),
            port(1, Input::Stopped, Output::Vhost(Box::new(VhostOutput::new(receiver)))),
        ];
        let header = NetHeader { flags: net_header::DATA_VALID, ..NetHeader::default() };
        let frame = [&header.encode()[..], &[0xff; 6], &[2, 0, 0, 0, 0, 1], &[0; 48]].concat();
        far.send(&frame).expect("there is room");
        assert_eq!(Forwarder::new().forward(&fabric, SourceId { port: 0, queue: 0 }), Progress::Moved(1));
        assert_eq!(driver.take().expect("a legal ring"), Some((0, 72)));
        let span = memory.translate(&mut RegionCache::default(), 0x10000, 1).expect("in memory");
        let mut flags = [0xff];
        // SAFETY: `memory` is alive.
        unsafe { span.read(0, &mut flags) };
        assert_eq!(flags, [0]);
        let completed = &fabric.port(1).expect("there").outputs[0].counters.completed_offloads;
        assert_eq!(completed.get(), 0, "there was nothing to do");
    }
}
