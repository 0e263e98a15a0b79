//! The end of a source: nothing of it may be half done.
//!
//! Frames overtake one that waits for room, so a source may have frames that were delivered and not given back. Whoever
//! serves its ring next would deliver them again.

use super::{BATCH, Forwarder, Progress};
use crate::fabric::{Fabric, SourceId};

impl Forwarder {
    /// Deals with every frame of `source` that is not the first to be taken next: what was delivered goes back to the
    /// sender, and what waits in front of it is delivered or dropped. A `patient` caller gives it the time that it would
    /// have had, which [`waiting`](crate::waiting) bounds however the receivers behave.
    pub fn settle(&mut self, fabric: &Fabric, source: SourceId, patient: bool) {
        let bounds = self.bounds;
        if !patient {
            self.bounds.most = 0;
        }
        while let Some(begun) = begun(fabric, source) {
            if !matches!(self.forward_up_to(fabric, source, begun), Progress::Moved(_) | Progress::Waiting) {
                break;
            }
        }
        self.bounds = bounds;
    }
}

/// How many of the oldest frames contain all that were touched.
fn begun(fabric: &Fabric, source: SourceId) -> Option<usize> {
    let slot = fabric.port(source.port)?.inputs.get(usize::from(source.queue))?;
    let state = slot.state.lock();
    let touched = state.done | state.counted;
    (touched != 0).then(|| BATCH - touched.leading_zeros() as usize)
}
