//! The end of a source: nothing of it may be half done.
//!
//! Frames overtake one that waits for room, so a source may have frames that were delivered and not given back. Whoever
//! serves its ring next would deliver them again.

use super::{BATCH, Forwarder, Progress};
use crate::fabric::{Fabric, SourceId};
use crate::port::Input;

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
            match self.forward_up_to(fabric, source, begun) {
                Progress::Moved(_) | Progress::Waiting => {}
                Progress::Idle if give_up(fabric, source) => {}
                _ => break,
            }
        }
        self.bounds = bounds;
    }
}

/// What is in front was taken away by the guest's IOMMU, and waits for a translation that nobody may be left to bring: it is
/// dropped. Returns whether this was why nothing was there. A ring that was itself taken away cannot be touched.
fn give_up(fabric: &Fabric, source: SourceId) -> bool {
    let Some(slot) = fabric.port(source.port).and_then(|port| port.inputs.get(usize::from(source.queue))) else {
        return false;
    };
    match &mut slot.state.lock().input {
        Input::Vhost(input) => input.queue().give_up_chain(),
        _ => false,
    }
}

/// How many of the oldest frames contain all that were touched.
fn begun(fabric: &Fabric, source: SourceId) -> Option<usize> {
    let slot = fabric.port(source.port)?.inputs.get(usize::from(source.queue))?;
    let state = slot.state.lock();
    let touched = state.done | state.counted;
    (touched != 0).then(|| BATCH - touched.leading_zeros() as usize)
}
