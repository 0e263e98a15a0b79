//! The guest's receive queue.

use std::os::fd::OwnedFd;

use viaduct_memory::{Call, GuestMemory, Span, access};
use viaduct_ring::{Batch, Chain, DeviceQueue, RingError};

use super::fill::{Scatter, fill};
use super::{VhostQueue, Vring, wrong_direction};
use crate::counters::DropReason;
use crate::forward::BATCH;
use crate::frame::{Frame, HEAD, Outgoing};
use crate::net_header::NetHeader;
use crate::port::Port;
use crate::sink::{Put, Sink};
use crate::trace::{Outcome, TracedPacket, first_bytes, now};

/// We transmit, the guest receives.
#[derive(Debug)]
pub(crate) struct VhostOutput {
    ring: Vring,
    mergeable: bool,
    /// Whether ordinary frames may take the short way: the header has 12 bytes, nobody logs what is written, and
    /// no record of chains in flight has to hear of each buffer before it is used.
    short_way: bool,
    /// Buffers peeked at, of which those before `next` are used up and those before `consumed` are taken from the ring.
    ready: Batch,
    next: usize,
    consumed: usize,
    /// Those before have been fetched into the cache.
    fetched: usize,
    /// What the driver did wrong; reported once.
    broken: Option<String>,
    /// Kept so that the eventfd stays open as long as the queue runs.
    kick: Option<OwnedFd>,
}

/// How many buffers are looked at in one go.
const LOOK_AHEAD: usize = 64;

impl VhostOutput {
    pub fn new(start: VhostQueue) -> VhostOutput {
        let VhostQueue { queue, kick, call, enabled, header_len, mergeable } = start;
        let mut ring = Vring { queue, call, header_len, enabled };
        // We look for buffers when there is a frame to deliver, so nobody needs to tell us about new ones.
        ring.queue.disable_notifications();
        ring.begin();
        let ready = Batch::with_capacity(LOOK_AHEAD);
        let short_way = false;
        let mut output =
            VhostOutput { ring, mergeable, short_way, ready, next: 0, consumed: 0, fetched: 0, broken: None, kick };
        output.find_way();
        output
    }

    /// The ring, with no buffer held back from it.
    pub fn queue(&mut self) -> &mut DeviceQueue {
        self.give_back();
        &mut self.ring.queue
    }

    pub fn set_call(&mut self, call: Option<Call>) {
        self.ring.call = call;
    }

    pub fn set_enabled(&mut self, enabled: bool) {
        self.ring.enabled = enabled;
        if enabled && self.memory().iotlb().is_some() {
            self.look_ahead();
        }
    }

    /// Whether frames may be delivered.
    pub fn is_enabled(&self) -> bool {
        self.ring.enabled && self.broken.is_none()
    }

    /// Whether the front-end has enabled it, broken or not.
    pub fn ring_enabled(&self) -> bool {
        self.ring.enabled
    }

    /// Descriptors in the ring, those available, and whether the driver can notify us.
    pub fn standing(&self) -> (u32, u32, bool) {
        (self.ring.queue.config().size, self.ring.queue.waiting(), self.kick.is_some())
    }

    /// Delivers nothing more, for this reason.
    pub fn break_with(&mut self, error: &str) {
        self.broken.get_or_insert_with(|| error.to_owned());
    }

    /// What the driver did wrong, the first time one asks.
    pub fn take_error(&mut self) -> Option<String> {
        self.broken.as_mut().filter(|error| !error.is_empty()).map(std::mem::take)
    }

    pub fn memory(&self) -> &GuestMemory {
        self.ring.queue.memory()
    }

    pub fn faulted(&self) -> bool {
        self.ring.queue.faulted()
    }

    /// Goes on with a new memory table, which may have a log of written pages or none.
    pub fn set_memory(&mut self, memory: GuestMemory) -> Result<(), RingError> {
        let moved = self.queue().set_memory(memory);
        self.find_way();
        moved
    }

    fn find_way(&mut self) {
        self.short_way = self.ring.header_len == NetHeader::LEN as u32
            && self.memory().log().is_none()
            && !self.ring.queue.is_recorded();
    }

    /// Shows what was put into the queue since the last flush to those who trace the port, whose queue pair it is.
    #[cold]
    pub fn trace(&self, port: &Port, pair: u16) {
        let header_len = self.ring.header_len;
        let mut at = self.consumed;
        while at < self.next {
            let chain = &self.ready.chains[at];
            // SAFETY: the queue whose buffers these are holds their memory.
            let data = unsafe { first_bytes(self.ready.writable(chain), chain.writable_len as usize) };
            // We have just written it; a guest that changes it deceives only the reader of the trace.
            let buffers = match data.get(10..12) {
                Some(count) if self.mergeable => usize::from(u16::from_le_bytes([count[0], count[1]])),
                _ => 1,
            };
            let end = (at + buffers.max(1)).min(self.next);
            let (before, taken) = (&self.ready.chains[self.consumed..at], &self.ready.chains[at..end]);
            let mut descriptors = Vec::new();
            for (index, chain) in taken.iter().enumerate() {
                let before = &self.ready.chains[self.consumed..at + index];
                descriptors.extend(self.ring.queue.descriptors(before, chain));
            }
            let packet = TracedPacket {
                time: now(),
                queue: 2 * pair,
                position: self.ring.queue.position(before),
                id: chain.id,
                descriptors,
                header_len,
                len: taken.iter().map(|chain| chain.writable_len).sum(),
                data,
                outcome: Outcome::Written,
            };
            port.traces.iter().for_each(|trace| trace.record(packet.clone()));
            at = end;
        }
    }

    /// Forgets the buffers that were only looked at.
    fn give_back(&mut self) {
        self.take_used();
        self.ready.clear();
        (self.next, self.consumed, self.fetched) = (0, 0, 0);
    }

    #[inline(always)]
    fn take_used(&mut self) {
        self.ring.queue.consume(&self.ready.chains[self.consumed..self.next]);
        self.consumed = self.next;
    }

    /// Looks at buffers until at least `wanted` are ready or there are no more.
    fn look(&mut self, wanted: usize) {
        if self.ready.chains.len() - self.next >= wanted || self.broken.is_some() {
            return;
        }
        self.look_again(wanted);
    }

    /// The front-end has answered for translations.
    pub fn translations_changed(&mut self) {
        self.ring.queue.translations_changed();
        self.look_ahead();
    }

    /// Some translations do not hold any more. What has been put into buffers is shown while the ring may still be touched:
    /// a poller that has filled them may only be about to do that. Lets go of the buffers that were looked at.
    pub fn translations_removed(&mut self, first: u64, last: u64) {
        self.take_used();
        self.ring.publish();
        self.queue().translations_removed(first, last);
    }

    /// Behind an IOMMU: looks at buffers early, so that what they lack is asked for before a frame needs them.
    #[cold]
    fn look_ahead(&mut self) {
        if self.broken.is_none() && self.ready.chains.len() - self.next < LOOK_AHEAD {
            self.look_again(LOOK_AHEAD);
        }
    }

    fn look_again(&mut self, wanted: usize) {
        self.give_back();
        let looked = self.ring.queue.peek(&mut self.ready, wanted.max(LOOK_AHEAD));
        let error = match looked {
            Ok(_) => self
                .ready
                .chains
                .iter()
                .find(|chain| (chain.readable != 0 || chain.writable_len < self.ring.header_len) && !chain.is_refused())
                .map(|chain| wrong_direction(chain, "receive", "no or too small device-writable")),
            Err(error) => Some(error.to_string()),
        };
        if error.is_some() {
            self.broken = error;
            self.ready.clear();
        }
    }

    /// A frame whose header or body is spread over several spans or buffers.
    #[inline(never)]
    fn put_scattered(&mut self, frame: &Outgoing) -> Put {
        let need = self.ring.header_len as usize + frame.len as usize;
        let mut buffers = 0;
        let mut room = 0;
        while room < need {
            if self.next + buffers >= self.ready.chains.len() {
                let before = self.ready.chains.len() - self.next;
                // Twice as many, so that tiny buffers are not read again for each of them.
                self.look((2 * before).max(1));
                if self.ready.chains.len() - self.next <= before {
                    return if before >= self.ring.queue.config().size as usize { Put::TooBig } else { Put::Full };
                }
                // All were read anew, and a driver may have made them smaller than they were when they were counted.
                (buffers, room) = (0, 0);
            }
            let chain = &self.ready.chains[self.next + buffers];
            if chain.is_refused() {
                return self.refuse(buffers + 1);
            }
            room += chain.writable_len as usize;
            buffers += 1;
            if !self.mergeable && room < need {
                return Put::TooBig;
            }
        }
        let mut header = NetHeader::from_words(frame.net, u32::from(frame.csum_offset));
        header.num_buffers = buffers as u16;
        let header = &header.encode()[..self.ring.header_len as usize];
        let taken = self.next..self.next + buffers;
        let mut scatter = Scatter::new(&self.ready, taken.clone());
        scatter.write(header);
        scatter.write(&frame.prefix_bytes()[..frame.prefix_len as usize]);
        for span in frame.rest() {
            scatter.copy(span);
        }
        if self.ring.queue.is_recorded() {
            self.ring.queue.consume(&self.ready.chains[taken.clone()]);
            self.consumed = taken.end;
        }
        let mut left = need as u32;
        for index in taken {
            let chain = self.ready.chains[index];
            let written = left.min(chain.writable_len);
            if self.memory().log().is_some() {
                self.mark_written(&chain, written);
            }
            self.ring.queue.complete(&chain, written);
            left -= written;
        }
        self.next += buffers;
        Put::Done
    }

    /// Marks the first `written` bytes of a buffer in the log of a migration: after they were written, and before the driver
    /// is told of them.
    #[cold]
    fn mark_written(&self, chain: &Chain, mut written: u32) {
        for span in self.ready.writable(chain) {
            let here = written.min(span.len());
            self.memory().mark_written(*span, here);
            written -= here;
        }
    }
}

impl VhostOutput {
    /// Gives `buffers` back empty, the last of which the IOMMU does not let us reach, and with them the frame up.
    #[cold]
    fn refuse(&mut self, buffers: usize) -> Put {
        let taken = self.next..self.next + buffers;
        if self.ring.queue.is_recorded() {
            self.ring.queue.consume(&self.ready.chains[taken.clone()]);
            self.consumed = taken.end;
        }
        for chain in &self.ready.chains[taken] {
            self.ring.queue.complete(chain, 0);
        }
        self.next += buffers;
        Put::Failed(DropReason::Iommu)
    }
}

impl Sink for VhostOutput {
    #[inline(always)]
    fn reserve(&mut self, frames: usize) {
        self.look(frames);
        let end = self.ready.chains.len().min(self.next + frames);
        for chain in self.ready.chains.get(self.fetched..end).unwrap_or_default() {
            let Some(start) = self.ready.spans.get(chain.first as usize).map(|span| span.as_ptr()) else { continue };
            access::prefetch_write(start);
            access::prefetch_write(start.wrapping_add(64));
        }
        self.fetched = self.fetched.max(end);
    }

    #[inline(never)]
    fn put(&mut self, frame: &Outgoing) -> Put {
        if self.broken.is_some() { Put::Full } else { self.put_scattered(frame) }
    }

    #[inline(always)]
    fn put_simple(&mut self, frame: &Frame, body: Span) -> Put {
        let header_len = NetHeader::LEN as u32;
        let written = header_len + frame.len;
        let Some(chain) = self.ready.chains.get(self.next) else { return self.put(&frame.as_it_is(&[body])) };
        if chain.writable != 1 || chain.writable_len < written || !self.short_way {
            return self.put(&frame.as_it_is(&[body]));
        }
        let target = self.ready.spans[chain.first as usize].as_ptr();
        let rest = body.skip(HEAD);
        // SAFETY: the buffer has room for header and frame, and `rest` is what follows the head; both memories are alive:
        // this queue holds the one, the batch's owner the other. A guest that lends us one buffer twice corrupts only its
        // own frames: the copy is opaque to the compiler.
        unsafe {
            access::store_u64_unaligned(target, frame.net);
            access::store_u32_unaligned(target.add(8), u32::from(frame.csum_offset) | 1 << 16);
            access::store_u64_unaligned(target.add(12), frame.head[0]);
            access::store_u64_unaligned(target.add(20), frame.head[1]);
            access::copy(target.add(28), rest.as_ptr(), rest.len() as usize);
        }
        self.ring.queue.complete(chain, written);
        self.next += 1;
        Put::Done
    }

    #[inline(always)]
    fn put_plain(&mut self, frames: &[Frame; BATCH], spans: &[Span], group: u64) -> (u64, u64) {
        if !self.short_way {
            return (group, 0);
        }
        let mut written = [0; BATCH];
        let chains = &self.ready.chains[self.next..];
        let (left, bytes) = fill(chains, &self.ready.spans, &mut written, frames, spans, group);
        let taken = (group & !left).count_ones() as usize;
        self.ring.queue.complete_written(&chains[..taken], &written[..taken]);
        self.next += taken;
        (left, bytes)
    }

    #[inline(always)]
    fn flush(&mut self) -> bool {
        self.take_used();
        let notified = self.ring.publish();
        if self.memory().iotlb().is_some() {
            self.look_ahead();
        }
        notified
    }
}
