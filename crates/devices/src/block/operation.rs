//! What a disk is asked to do, one step of a request.

use std::io;

use super::buffer::GuestBuffer;
use super::image::Image;

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes, not zero.
    pub len: u64,
    /// For zeroes: the room may be given back.
    pub unmap: bool,
}

/// An operation for the threads that may wait.
#[derive(Debug)]
pub(super) enum Operation {
    Read { offset: u64, data: GuestBuffer },
    Write { offset: u64, data: GuestBuffer },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

impl Operation {
    /// Does it. `durable`: what it changes is durable afterwards (write-through).
    pub fn run(&self, image: &dyn Image, durable: bool) -> io::Result<()> {
        match self {
            Operation::Read { offset, data } => return image.read(*offset, data),
            Operation::Write { offset, data } => image.write(*offset, data)?,
            Operation::Flush => return image.flush(),
            Operation::Discard(ranges) => {
                ranges.iter().try_for_each(|range| image.discard(range.offset, range.len))?;
            }
            Operation::WriteZeroes(ranges) => {
                ranges.iter().try_for_each(|range| image.write_zeroes(range.offset, range.len, range.unmap))?;
            }
        }
        if durable { image.flush() } else { Ok(()) }
    }
}
