//! Completes what a sender left to an offload that the receiver does not accept: checksums and segmentation. The frame is
//! copied into memory of our own first, so that its sender cannot change it under the computation.

use std::ptr::NonNull;

use viaduct_memory::Span;

use crate::counters::DropReason;
use crate::frame::Outgoing;
use crate::net_header::{GSO_NONE, NetHeader};
use crate::offload::{Segments, complete_checksum};
use crate::sink::{Put, Sink};

/// Memory for the frames that are completed, reused.
#[derive(Debug, Default)]
pub(crate) struct SoftwareOffload {
    whole: Vec<u8>,
    segment: Vec<u8>,
}

impl SoftwareOffload {
    /// Puts the frame into the sink with nothing left to do for the receiver.
    #[inline(never)]
    pub fn complete_into<S: Sink>(&mut self, sink: &mut S, outgoing: &Outgoing, max_frame: u32) -> Put {
        self.whole.clear();
        outgoing.append_to(&mut self.whole);
        let mut header = NetHeader::from_words(outgoing.net, u32::from(outgoing.csum_offset));
        if header.gso_type == GSO_NONE {
            return match complete_checksum(&mut self.whole, &mut header) {
                Ok(()) => put(sink, &mut self.whole, max_frame),
                Err(_) => Put::Failed(DropReason::Offload),
            };
        }
        let Ok(mut segments) = Segments::new(&self.whole, &header) else { return Put::Failed(DropReason::Offload) };
        sink.reserve(segments.count());
        let mut some = false;
        while let Some((headers, payload)) = segments.next_segment() {
            self.segment.clear();
            self.segment.extend_from_slice(headers);
            self.segment.extend_from_slice(payload);
            match put(sink, &mut self.segment, max_frame) {
                Put::Done => some = true,
                // What the receiver has no room for is lost, as on a wire: the sender's TCP sends it again.
                Put::Full if some => return Put::Failed(DropReason::NoBuffers),
                other => return other,
            }
        }
        Put::Done
    }
}

/// Puts a finished frame of our own into the sink.
fn put<S: Sink>(sink: &mut S, frame: &mut [u8], max_frame: u32) -> Put {
    let len = frame.len() as u32;
    // A tag does not count towards the limit; the frame may have one.
    if len > max_frame.saturating_add(4) {
        return Put::TooBig;
    }
    let Some(start) = NonNull::new(frame.as_mut_ptr()) else { return Put::Failed(DropReason::Offload) };
    let body = [Span::new(start, len)];
    sink.put(&Outgoing { net: 0, csum_offset: 0, prefix: [0; 3], prefix_len: 0, body: &body, skip: 0, len })
}
