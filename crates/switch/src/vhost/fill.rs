//! Frames into receive buffers: one buffer each, or spread over several.

use viaduct_memory::{Span, access};
use viaduct_ring::{Batch, Chain};

use crate::forward::BATCH;
use crate::frame::{Frame, HEAD};
use crate::net_header::NetHeader;

/// Puts plain frames of `group`, lowest first, into one buffer each as long as they fit. Returns those that are left and the
/// bytes of the others. A function of its own, so that all its values find registers.
#[inline(never)]
pub(super) fn fill(
    chains: &[Chain],
    buffers: &[Span],
    written: &mut [u32; BATCH],
    frames: &[Frame; BATCH],
    spans: &[Span],
    group: u64,
) -> (u64, u64) {
    let (mut left, mut bytes) = (group, 0);
    for (chain, written) in chains.iter().zip(written) {
        let Some(frame) = frames.get(left.trailing_zeros() as usize) else { break };
        let (Some(body), Some(buffer)) = (spans.get(frame.first as usize), buffers.get(chain.first as usize)) else {
            break;
        };
        *written = NetHeader::LEN as u32 + frame.len;
        if chain.writable != 1 || buffer.len() < *written {
            break;
        }
        let (target, rest) = (buffer.as_ptr(), body.skip(HEAD));
        // SAFETY: as in `VhostOutput::put_simple`.
        unsafe {
            access::store_u64_unaligned(target, 0);
            access::store_u32_unaligned(target.add(8), 1 << 16);
            access::store_u64_unaligned(target.add(12), frame.head[0]);
            access::store_u64_unaligned(target.add(20), frame.head[1]);
            access::copy(target.add(28), rest.as_ptr(), rest.len() as usize);
        }
        left &= left - 1;
        bytes += u64::from(frame.len);
    }
    (left, bytes)
}

/// Writes one run of bytes after another into the writable spans of several chains.
pub(super) struct Scatter<'a> {
    batch: &'a Batch,
    chains: std::ops::Range<usize>,
    spans: &'a [Span],
    offset: u32,
}

impl<'a> Scatter<'a> {
    pub fn new(batch: &'a Batch, chains: std::ops::Range<usize>) -> Scatter<'a> {
        Scatter { batch, chains, spans: &[], offset: 0 }
    }

    /// The room at the current place; there is some, because the caller has counted.
    fn room(&mut self) -> Span {
        loop {
            match self.spans.split_first() {
                Some((span, _)) if self.offset < span.len() => return span.skip(self.offset),
                Some((_, rest)) => (self.spans, self.offset) = (rest, 0),
                None => {
                    let chain = self.chains.next().expect("the caller has counted enough room");
                    (self.spans, self.offset) = (self.batch.writable(&self.batch.chains[chain]), 0);
                }
            }
        }
    }

    pub fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.room();
            let (now, later) = bytes.split_at(bytes.len().min(room.len() as usize));
            // SAFETY: the queue whose buffers these are holds their memory.
            unsafe { room.write(0, now) };
            self.offset += now.len() as u32;
            bytes = later;
        }
    }

    pub fn copy(&mut self, mut from: Span) {
        while !from.is_empty() {
            let room = self.room();
            let len = from.len().min(room.len());
            // SAFETY: the queue whose buffers these are holds their memory, the batch's owner that of the frame.
            unsafe { access::copy(room.as_ptr(), from.as_ptr(), len as usize) };
            self.offset += len;
            from = from.skip(len);
        }
    }
}
