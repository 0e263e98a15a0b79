//! Posted writes: those that a device need not see at once (the word is PCI's; PCI 3.0, 3.2.5).

use crate::bus::Range;

/// Which of a processor's two kinds of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// The ports.
    Ports,
    /// The physical addresses.
    Addresses,
}

/// Where writes may be posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posting {
    /// Of which kind the addresses are.
    pub space: Space,
    /// A write that lies in them as a whole may be posted.
    pub range: Range,
}

/// A write that the guest has made without an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostedWrite {
    space: Space,
    address: u64,
    bytes: [u8; 8],
    len: usize,
}

impl PostedWrite {
    /// A write of the first `len` bytes; there are at most eight.
    pub fn new(space: Space, address: u64, bytes: [u8; 8], len: usize) -> PostedWrite {
        PostedWrite { space, address, bytes, len: len.min(bytes.len()) }
    }

    /// Of which kind the address is.
    pub fn space(&self) -> Space {
        self.space
    }

    /// The port or guest-physical address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// What is written.
    pub fn data(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
