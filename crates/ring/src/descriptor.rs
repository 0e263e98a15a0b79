//! The sixteen bytes of a descriptor, split and packed, and a place in a packed ring.
//!
//! Both layouts begin with the buffer's address and length. What follows is `flags`, `next` in the split layout
//! (virtio 1.2, 2.7.5) and `id`, `flags` in the packed one (2.8.13). A descriptor is always read as two 64-bit words,
//! each once, so that what was checked is what is used, and there are never more than two loads.

use std::sync::atomic::Ordering;

use viaduct_memory::access::{load_u64, store_u64};

/// The buffer goes on in another descriptor (virtio 1.2, 2.7.5 and 2.8.6).
pub const NEXT: u16 = 1;
/// The device writes the buffer; otherwise it reads it.
pub const WRITE: u16 = 2;
/// The buffer holds a table of descriptors (virtio 1.2, 2.7.5.3 and 2.8.7).
pub const INDIRECT: u16 = 4;
/// Packed: equals the driver's wrap counter when the descriptor is made available (virtio 1.2, 2.8.1).
pub const AVAIL: u16 = 1 << 7;
/// Packed: equals the device's wrap counter when the descriptor is used.
pub const USED: u16 = 1 << 15;

/// Bytes of a descriptor.
pub const BYTES: usize = 16;

/// A descriptor read into locals: the address and the word behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub addr: u64,
    word: u64,
}

impl Descriptor {
    /// A split descriptor.
    #[inline(always)]
    pub const fn split(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
        Descriptor { addr, word: len as u64 | (flags as u64) << 32 | (next as u64) << 48 }
    }

    /// A packed descriptor.
    #[inline(always)]
    pub const fn packed(addr: u64, len: u32, id: u16, flags: u16) -> Descriptor {
        Descriptor { addr, word: packed_word(len, id, flags) }
    }

    /// From two words already read.
    #[inline(always)]
    pub const fn from_words(addr: u64, word: u64) -> Descriptor {
        Descriptor { addr, word }
    }

    /// Reads entry `index` of `table`.
    ///
    /// # Safety
    /// The entry is mapped and `table` aligned to 8.
    #[inline(always)]
    pub unsafe fn load(table: *const u8, index: usize) -> Descriptor {
        // SAFETY: given by the caller.
        unsafe {
            let at = table.add(index * BYTES).cast::<u64>();
            Descriptor { addr: load_u64(at, Ordering::Relaxed), word: load_u64(at.add(1), Ordering::Relaxed) }
        }
    }

    /// Writes entry `index` of `table`, in no particular order.
    ///
    /// # Safety
    /// As for [`load`](Descriptor::load).
    #[inline(always)]
    pub unsafe fn store(self, table: *mut u8, index: usize) {
        // SAFETY: given by the caller.
        unsafe {
            let at = table.add(index * BYTES).cast::<u64>();
            store_u64(at, self.addr, Ordering::Relaxed);
            store_u64(at.add(1), self.word, Ordering::Relaxed);
        }
    }

    /// Length in bytes, in either layout.
    #[inline(always)]
    pub const fn len(self) -> u32 {
        self.word as u32
    }

    /// Flags of a split descriptor.
    #[inline(always)]
    pub const fn split_flags(self) -> u16 {
        (self.word >> 32) as u16
    }

    /// Where a split chain goes on.
    #[inline(always)]
    pub const fn next(self) -> u16 {
        (self.word >> 48) as u16
    }

    /// Whether it is as in a new ring, all zero (virtio 1.2, 2.8.13), but for an address that a driver has written already.
    pub const fn is_blank(self) -> bool {
        self.word == 0
    }

    /// Buffer id of a packed descriptor.
    #[inline(always)]
    pub const fn id(self) -> u16 {
        (self.word >> 32) as u16
    }

    /// Flags of a packed descriptor.
    #[inline(always)]
    pub const fn packed_flags(self) -> u16 {
        (self.word >> 48) as u16
    }
}

/// The second word of a packed descriptor, available or used.
#[inline(always)]
pub(crate) const fn packed_word(len: u32, id: u16, flags: u16) -> u64 {
    len as u64 | (id as u64) << 32 | (flags as u64) << 48
}

/// A place in a packed ring and the wrap counter that goes with it (virtio 1.2, 2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub index: u16,
    pub wrap: bool,
}

impl Position {
    /// From the encoding of event suppression and of SET_VRING_BASE: index in bits 0-14, wrap counter in bit 15.
    #[inline(always)]
    pub const fn decode(value: u16) -> Position {
        Position { index: value & 0x7fff, wrap: value & 0x8000 != 0 }
    }

    /// The inverse of [`decode`](Position::decode).
    #[inline(always)]
    pub const fn encode(self) -> u16 {
        self.index | (self.wrap as u16) << 15
    }

    /// Goes `slots` (at most `size`) descriptors on.
    #[inline(always)]
    pub const fn advance(&mut self, slots: u16, size: u16) {
        // Both are at most 32768, so the sum is below 2^16.
        self.index += slots;
        if self.index >= size {
            // Once a lap: a branch that is foreseen costs nothing, a conditional move would make every step wait.
            once_a_lap();
            self.index -= size;
            self.wrap = !self.wrap;
        }
    }

    /// AVAIL and USED of a descriptor that the driver made available here.
    #[inline(always)]
    pub const fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// AVAIL and USED of a descriptor that the device used here.
    #[inline(always)]
    pub const fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// Tells the compiler that the branch it stands in is rarely taken.
#[cold]
const fn once_a_lap() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_laid_out_as_the_specification_draws_them() {
        let mut table = [0u64; 4];
        // SAFETY: the table has two entries and is aligned to 8.
        unsafe {
            Descriptor::split(0x1122, 0x3344, 0x5566, 0x7788).store(table.as_mut_ptr().cast(), 0);
            Descriptor::packed(0x99, 0xaa, 0xbb, 0xcc).store(table.as_mut_ptr().cast(), 1);
        }
        let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(bytes[..16], [0x22, 0x11, 0, 0, 0, 0, 0, 0, 0x44, 0x33, 0, 0, 0x66, 0x55, 0x88, 0x77]);
        assert_eq!(bytes[16..], [0x99, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0, 0, 0, 0xbb, 0, 0xcc, 0]);
    }

    #[test]
    fn a_position_wraps_at_any_size() {
        let mut position = Position { index: 2, wrap: true };
        position.advance(1, 3);
        assert_eq!(position, Position { index: 0, wrap: false });
        position.advance(3, 3);
        assert_eq!(position, Position { index: 0, wrap: true });
        let mut position = Position { index: 32767, wrap: true };
        position.advance(32768, 32768);
        assert_eq!(position, Position { index: 32767, wrap: false });
        assert_eq!(Position::decode(position.encode()), position);
    }
}
