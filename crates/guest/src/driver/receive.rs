//! The receive side (virtio 1.2, 5.1.6.3 and 5.1.6.4).

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use viaduct_memory::Span;
use viaduct_memory::access::{prefetch_read, read_bytes};
use viaduct_ring::RingError;
use viaduct_switch::net_header::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, NEEDS_CSUM, NetHeader};

use super::Queue;
use super::plan::HEADER;
use crate::features;
use crate::link::LinkCounters;

/// Used buffers looked for at a time.
const BATCH: usize = 32;

/// A received frame, still in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// What the device says about it; checked against what was negotiated.
    pub header: NetHeader,
    /// Bytes of the frame.
    pub len: u32,
    /// Its first part.
    pub first: Span,
    /// Where its other parts begin in the queue's list, and how many there are.
    rest: (u32, u32),
}

/// The driver of one receive queue.
pub struct ReceiveQueue {
    inner: Queue,
    mergeable: bool,
    checksum: bool,
    /// `gso_type` values that may come.
    segments: u64,
    /// Buffers that came back and have not been looked at: index and bytes written.
    used: VecDeque<(u64, u32)>,
    scratch: Vec<(u64, u32)>,
    /// Buffers of frames that were handed out, to be posted again.
    taken: Vec<u64>,
    /// Parts of these frames but the first.
    parts: Vec<Span>,
    counters: Arc<LinkCounters>,
}

impl ReceiveQueue {
    pub(super) fn new(inner: Queue, features: u64, counters: Arc<LinkCounters>) -> ReceiveQueue {
        let kinds = [
            (GSO_NONE, u64::MAX),
            (GSO_TCPV4, features::NET_GUEST_TSO4),
            (GSO_TCPV6, features::NET_GUEST_TSO6),
            (GSO_UDP, features::NET_GUEST_UFO),
            (GSO_UDP_L4, features::NET_GUEST_USO4 | features::NET_GUEST_USO6),
        ];
        let segments = kinds.iter().filter(|(_, bits)| features & bits != 0).map(|(kind, _)| 1 << kind).sum();
        ReceiveQueue {
            mergeable: features & features::NET_MRG_RXBUF != 0,
            checksum: features & features::NET_GUEST_CSUM != 0,
            segments,
            used: VecDeque::with_capacity(2 * BATCH),
            scratch: Vec::with_capacity(BATCH),
            taken: (0..u64::from(inner.area.count)).collect(),
            parts: Vec::new(),
            inner,
            counters,
        }
    }

    pub(super) fn call_fd(&self) -> RawFd {
        self.inner.call.as_raw_fd()
    }

    /// Gives the device all buffers.
    pub(super) fn post_all(&mut self) {
        self.inner.queue.disable_notifications();
        self.recycle();
    }

    /// Appends up to `max` received frames to `frames`. They stay where they are until [`recycle`](ReceiveQueue::recycle).
    ///
    /// # Errors
    /// What the device did wrong in the ring; the queue is broken then.
    #[inline]
    pub fn receive(&mut self, frames: &mut Vec<Frame>, max: usize) -> Result<usize, RingError> {
        self.look(max)?;
        let before = frames.len();
        while frames.len() - before < max {
            match self.next_frame() {
                Some(Some(frame)) => frames.push(frame),
                Some(None) => LinkCounters::add(&self.counters.rx_violations, 1),
                None => break,
            }
        }
        let found = frames.len() - before;
        if found > 0 {
            let bytes = frames[before..].iter().map(|frame| u64::from(frame.len)).sum();
            LinkCounters::add(&self.counters.rx_frames, found as u64);
            LinkCounters::add(&self.counters.rx_bytes, bytes);
        }
        Ok(found)
    }

    /// Takes used buffers out of the ring.
    #[inline]
    fn look(&mut self, max: usize) -> Result<(), RingError> {
        if self.used.len() >= max {
            return Ok(());
        }
        self.scratch.clear();
        self.inner.queue.take_many(&mut self.scratch, max.max(BATCH))?;
        for &(index, _) in &self.scratch {
            prefetch_read(self.inner.span(index as usize).as_ptr());
        }
        self.used.extend(&self.scratch);
        Ok(())
    }

    /// The next frame whose buffers have all come back; `Some(None)` for one that has to be dropped.
    #[inline]
    fn next_frame(&mut self) -> Option<Option<Frame>> {
        let &(index, written) = self.used.front()?;
        let span = self.inner.span(index as usize);
        if written < HEADER || written > span.len() {
            self.take_buffers(1);
            return Some(None);
        }
        // SAFETY: the buffer is longer than a header, and our memory lives as long as the queue.
        let header = NetHeader::parse(&unsafe { read_bytes::<{ HEADER as usize }>(span.as_ptr()) });
        let buffers = if self.mergeable { usize::from(header.num_buffers) } else { 1 };
        if buffers == 0 || buffers > self.inner.area.count as usize {
            self.take_buffers(1);
            return Some(None);
        }
        if self.used.len() < buffers && !self.look_for(buffers) {
            return None;
        }
        let first = part(span, HEADER, written - HEADER);
        let mut frame = Frame { header, len: first.len(), first, rest: (self.parts.len() as u32, 0) };
        for i in 1..buffers {
            let (index, written) = self.used[i];
            let part = part(self.inner.span(index as usize), 0, written);
            frame.len = frame.len.saturating_add(part.len());
            frame.rest.1 += 1;
            self.parts.push(part);
        }
        self.take_buffers(buffers);
        Some(self.allowed(&frame).then_some(frame))
    }

    /// Looks once more for the buffers of a frame of which only the first ones were found. The device makes all visible
    /// at once or almost, and an error comes back with the next look.
    #[cold]
    fn look_for(&mut self, buffers: usize) -> bool {
        self.scratch.clear();
        let missing = buffers - self.used.len();
        let _ = self.inner.queue.take_many(&mut self.scratch, missing);
        self.used.extend(&self.scratch);
        self.used.len() >= buffers
    }

    #[inline]
    fn take_buffers(&mut self, n: usize) {
        self.taken.extend(self.used.drain(..n).map(|(index, _)| index));
    }

    /// Whether the device was allowed to send this (virtio 1.2, 5.1.6.4: it must not use what was not negotiated).
    #[inline]
    fn allowed(&self, frame: &Frame) -> bool {
        let NetHeader { flags, gso_type, gso_size, csum_start, csum_offset, .. } = frame.header;
        let kind = gso_type & !GSO_ECN;
        let needs_checksum = flags & NEEDS_CSUM != 0;
        let end = u32::from(csum_start) + u32::from(csum_offset) + 2;
        frame.len >= 14
            && (!needs_checksum || (self.checksum && end <= frame.len))
            && kind < 64
            && self.segments >> kind & 1 == 1
            && (kind == GSO_NONE || gso_size != 0)
    }

    /// The parts of a frame behind the first.
    #[inline]
    pub fn rest(&self, frame: &Frame) -> &[Span] {
        let (start, n) = (frame.rest.0 as usize, frame.rest.1 as usize);
        &self.parts[start..start + n]
    }

    /// Copies a frame out of shared memory, in place of what `bytes` had.
    pub fn copy(&self, frame: &Frame, bytes: &mut Vec<u8>) {
        // What was there is overwritten, so only growth costs zeroes.
        bytes.resize(frame.len as usize, 0);
        let mut at = 0;
        for span in std::iter::once(&frame.first).chain(self.rest(frame)) {
            let end = at + span.len() as usize;
            // SAFETY: spans of a frame lie in its buffers, which are ours until they are recycled.
            unsafe { span.read(0, &mut bytes[at..end]) };
            at = end;
        }
    }

    /// Posts the buffers of all frames handed out so far again.
    #[inline]
    pub fn recycle(&mut self) {
        if self.taken.is_empty() {
            return;
        }
        let size = self.inner.area.size;
        for &index in &self.taken {
            // There is a descriptor for every buffer.
            self.inner.queue.add_single(self.inner.addr(index as usize), size, true, index);
        }
        self.taken.clear();
        self.parts.clear();
        self.inner.publish(&self.counters);
    }

    /// Asks the device to call. Returns whether there are frames already.
    pub fn arm(&mut self) -> bool {
        self.inner.queue.enable_notifications()
    }

    /// Asks the device not to call, and forgets calls that came.
    pub fn disarm(&mut self) {
        self.inner.queue.disable_notifications();
        // An error means that none came.
        let _ = self.inner.call.read();
    }
}

/// `len` bytes of a buffer, from `offset` on.
#[inline]
fn part(span: Span, offset: u32, len: u32) -> Span {
    let len = len.min(span.len() - offset);
    // SAFETY: the offset lies inside the span, so the address is not null.
    Span::new(unsafe { std::ptr::NonNull::new_unchecked(span.as_ptr().add(offset as usize)) }, len)
}
