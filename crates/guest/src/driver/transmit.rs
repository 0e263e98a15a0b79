//! The transmit side (virtio 1.2, 5.1.6.2).

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use viaduct_memory::Span;
use viaduct_ring::RingError;
use viaduct_switch::net_header::{GSO_TCPV4, NEEDS_CSUM, NetHeader};

use super::Queue;
use super::plan::HEADER;
use crate::checksum;
use crate::link::LinkCounters;

/// What the device has to do to a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Complete the checksum that the frame does not have.
    pub checksum: bool,
    /// Cut the TCP over IPv4 packet into segments of so many bytes.
    pub segment: Option<u16>,
}

/// The driver of one transmit queue.
pub struct TransmitQueue {
    inner: Queue,
    /// Buffers that the device does not hold.
    free: Vec<u64>,
    used: Vec<(u64, u32)>,
    /// Header and frame as two elements in an indirect table, instead of one.
    indirect: bool,
    counters: Arc<LinkCounters>,
}

impl TransmitQueue {
    pub(super) fn new(inner: Queue, counters: Arc<LinkCounters>) -> TransmitQueue {
        let count = inner.area.count;
        TransmitQueue {
            // The last is taken first.
            free: (0..u64::from(count)).rev().collect(),
            used: Vec::with_capacity(count as usize),
            indirect: inner.area.tables.is_some(),
            inner,
            counters,
        }
    }

    pub(super) fn call_fd(&self) -> RawFd {
        self.inner.call.as_raw_fd()
    }

    pub(super) fn be_quiet(&mut self) {
        self.inner.queue.disable_notifications();
    }

    /// Number of buffers.
    pub fn capacity(&self) -> usize {
        self.inner.area.count as usize
    }

    /// Buffers that the device does not hold.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes back the buffers that the device is done with. Returns how many are free now.
    ///
    /// # Errors
    /// What the device did wrong in the ring; the queue is broken then.
    #[inline]
    pub fn reclaim(&mut self) -> Result<usize, RingError> {
        self.used.clear();
        self.inner.queue.take_many(&mut self.used, self.inner.area.count as usize)?;
        self.free.extend(self.used.iter().map(|&(index, _)| index));
        Ok(self.free.len())
    }

    /// A free buffer and its place, the virtio-net header at its beginning.
    #[inline]
    pub fn take(&mut self) -> Option<(u64, Span)> {
        let index = self.free.pop()?;
        Some((index, self.inner.span(index as usize)))
    }

    /// Writes a part of buffer `index`'s frame, which the device does not hold, for frames that are to be sent from it.
    pub fn fill(&mut self, index: u64, offset: u32, bytes: &[u8]) {
        let span = self.inner.span(index as usize);
        // SAFETY: the span checks that the range lies inside; our memory lives as long as the queue.
        unsafe {
            span.write(0, &NetHeader::default().encode());
            span.write(HEADER + offset, bytes);
        }
    }

    /// Stages buffer `index`, which came from [`take`](TransmitQueue::take) and holds a header and a frame of `len`
    /// bytes.
    #[inline]
    pub fn stage(&mut self, index: u64, len: u32) {
        let addr = self.inner.addr(index as usize);
        let staged = if self.indirect {
            // Two elements always fit into a table.
            let elements = [(addr, HEADER), (addr + u64::from(HEADER), len)];
            self.inner.queue.add(&elements, &[], index).unwrap_or(false)
        } else {
            self.inner.queue.add_single(addr, HEADER + len, false, index)
        };
        // There is a descriptor for every buffer.
        debug_assert!(staged);
        LinkCounters::add(&self.counters.tx_frames, 1);
        LinkCounters::add(&self.counters.tx_bytes, len.into());
    }

    /// Writes header and frame into a free buffer and stages it. `false`: there is none, or the frame is too long.
    pub fn send(&mut self, frame: &mut [u8], offload: Offload) -> bool {
        let room = (self.inner.area.size - HEADER) as usize;
        if frame.len() > room {
            return false;
        }
        let Some((index, span)) = self.take() else { return false };
        let header = header(frame, offload).encode();
        // SAFETY: the buffer is not the device's now, and has room for both.
        unsafe {
            span.write(0, &header);
            span.write(HEADER, frame);
        }
        self.stage(index, frame.len() as u32);
        true
    }

    /// Shows the device what was staged.
    #[inline]
    pub fn publish(&mut self) {
        self.inner.publish(&self.counters);
    }

    /// Asks the device to call when it is done with a buffer. Returns whether there is one already.
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

/// The header that asks for `offload`; the frame's checksum field is made what it asks for.
fn header(frame: &mut [u8], offload: Offload) -> NetHeader {
    let mut header = NetHeader::default();
    if !offload.checksum {
        return header;
    }
    let Some((start, offset)) = checksum::prepare_partial(frame) else { return header };
    header.flags = NEEDS_CSUM;
    (header.csum_start, header.csum_offset) = (start, offset);
    if let Some(size) = offload.segment {
        // The TCP header's length stands in its 13th byte in words of four bytes (RFC 9293, 3.1).
        let words = frame.get(usize::from(start) + 12).map_or(5, |byte| byte >> 4);
        header.gso_type = GSO_TCPV4;
        header.gso_size = size;
        header.hdr_len = start + u16::from(words) * 4;
    }
    header
}
