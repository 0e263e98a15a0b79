//! A port that swallows every frame.

use crate::frame::Outgoing;
use crate::sink::{Put, Sink};

/// Takes everything and keeps nothing.
#[derive(Debug)]
pub(crate) struct Null;

impl Sink for Null {
    fn reserve(&mut self, _frames: usize) {}

    fn put(&mut self, _frame: &Outgoing) -> Put {
        Put::Done
    }

    fn flush(&mut self) -> bool {
        false
    }
}
