//! Where frames go: the one operation that every kind of port implements for sending.

use viaduct_memory::Span;

use crate::counters::DropReason;
use crate::forward::BATCH;
use crate::frame::{Frame, Outgoing};

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// It is in the receiver's buffers, to be seen with the next flush.
    Done,
    /// There is no room now.
    Full,
    /// There will never be room.
    TooBig,
    /// It is lost, for this reason.
    Failed(DropReason),
}

/// Something that takes frames.
pub(crate) trait Sink {
    /// Announces that up to `frames` frames will come, so that buffers can be fetched while other work is done.
    fn reserve(&mut self, frames: usize);
    /// Takes one frame.
    fn put(&mut self, frame: &Outgoing) -> Put;
    /// Takes one frame that lies in one piece and has at least 16 bytes, as it is.
    fn put_simple(&mut self, frame: &Frame, body: Span) -> Put {
        self.put(&frame.as_it_is(&[body]))
    }
    /// Takes as many of the frames of `group` as find ordinary buffers, lowest first. They are plain. Returns
    /// those that are left, to be put one by one, and the bytes of the others.
    fn put_plain(&mut self, _frames: &[Frame; BATCH], _spans: &[Span], group: u64) -> (u64, u64) {
        (group, 0)
    }
    /// Shows what was taken to the receiver. Returns whether it was notified.
    fn flush(&mut self) -> bool;
}
