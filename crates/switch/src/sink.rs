//! Where frames go: the one operation that every kind of port implements for sending.

use crate::frame::Outgoing;

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// It is in the receiver's buffers, to be seen with the next flush.
    Done,
    /// There is no room now.
    Full,
    /// There will never be room.
    TooBig,
    /// The host refused it.
    Failed,
}

/// Something that takes frames.
pub(crate) trait Sink {
    /// Announces that up to `frames` frames will come, so that buffers can be fetched while other work is done.
    fn reserve(&mut self, frames: usize);
    /// Takes one frame.
    fn put(&mut self, frame: &Outgoing) -> Put;
    /// Shows what was taken to the receiver. Returns whether it was notified.
    fn flush(&mut self) -> bool;
}
