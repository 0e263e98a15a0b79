//! Completes what a sender left to an offload that the receiver does not accept: checksums and segmentation. The frame is
//! copied into memory of our own first, so that its sender cannot change it under the computation.

use std::ptr::NonNull;

use viaduct_memory::Span;

use crate::counters::DropReason;
use crate::frame::{HEAD, Outgoing};
use crate::net_header::{GSO_NONE, NEEDS_CSUM, NetHeader};
use crate::offload::{Segments, complete_checksum};
use crate::sink::{Put, Sink};

/// Memory for the frames that are completed, reused.
#[derive(Debug, Default)]
pub(crate) struct SoftwareOffload {
    whole: Vec<u8>,
    segment: Vec<u8>,
}

impl SoftwareOffload {
    /// Puts the frame into the sink with nothing left to do for the receiver. False: there is no room now for any of it.
    #[inline(never)]
    pub fn complete_into<S: Sink>(
        &mut self,
        sink: &mut S,
        outgoing: &Outgoing,
        max_frame: u32,
    ) -> Result<bool, DropReason> {
        self.whole.clear();
        outgoing.append_to(&mut self.whole);
        let mut header = NetHeader::from_words(outgoing.net, u32::from(outgoing.csum_offset));
        if header.gso_type == GSO_NONE {
            complete_checksum(&mut self.whole, &mut header).map_err(|_| DropReason::Offload)?;
            return put(sink, &mut self.whole, max_frame);
        }
        if header.flags & NEEDS_CSUM == 0 {
            return Err(DropReason::BadHeader);
        }
        let mut segments = Segments::new(&self.whole, &header).map_err(|_| DropReason::Offload)?;
        sink.reserve(segments.count());
        let mut some = false;
        while let Some((headers, payload)) = segments.next_segment() {
            self.segment.clear();
            self.segment.extend_from_slice(headers);
            self.segment.extend_from_slice(payload);
            // What the receiver has no room for is lost, as on a wire: the sender's TCP sends it again.
            match put(sink, &mut self.segment, max_frame)? {
                true => some = true,
                false if some => return Err(DropReason::NoBuffers),
                false => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Puts a finished frame of our own into the sink. False: no room.
fn put<S: Sink>(sink: &mut S, frame: &mut [u8], max_frame: u32) -> Result<bool, DropReason> {
    let len = frame.len() as u32;
    // A tag does not count towards the limit; the frame may have one.
    if len > max_frame.saturating_add(4) {
        return Err(DropReason::TooBig);
    }
    let mut prefix = [0; 24];
    let prefix_len = len.min(HEAD);
    prefix[..prefix_len as usize].copy_from_slice(&frame[..prefix_len as usize]);
    let mut words = [0; 3];
    for (word, chunk) in words.iter_mut().zip(prefix.chunks_exact(8)) {
        *word = chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    let Some(start) = NonNull::new(frame.as_mut_ptr()) else { return Err(DropReason::Offload) };
    let body = [Span::new(start, len)];
    let outgoing = Outgoing { net: 0, csum_offset: 0, prefix: words, prefix_len, body: &body, skip: prefix_len, len };
    match sink.put(&outgoing) {
        Put::Done => Ok(true),
        Put::Full => Ok(false),
        Put::TooBig => Err(DropReason::TooBig),
        Put::Failed => Err(DropReason::Io),
    }
}
