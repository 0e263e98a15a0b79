//! One queue's part of the record.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use viaduct_memory::Mapping;
use viaduct_memory::access::{load_u16, load_u32, load_u64, store_u16, store_u32, store_u64};

use super::may_die;
use crate::{Layout, RingError};

/// Bytes of the header and of one descriptor's state.
const fn shape(layout: Layout) -> (u64, u64) {
    match layout {
        Layout::Split => (16, 16),
        Layout::Packed => (32, 32),
    }
}

/// Bytes that one queue of `size` descriptors needs in the record; queue `n` begins at `n` times as many.
pub fn inflight_bytes(layout: Layout, size: u32) -> u64 {
    let (header, state) = shape(layout);
    // Each queue on cache lines of its own: their pollers may differ.
    (header + state * u64::from(size)).next_multiple_of(64)
}

/// Where things are in the header of either layout.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;

/// The version that this layout of the record has.
const CURRENT: u16 = 1;

/// One queue's part of the record. Offsets are in bytes and, like the mapping's start, multiples of the field's size.
#[derive(Debug)]
pub(crate) struct Region {
    _mapping: Arc<Mapping>,
    start: *mut u8,
    header: usize,
    state: usize,
    pub size: u16,
}

// SAFETY: an address in the mapping beside it; it is accessed atomically.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// The part at `offset` of the record.
    pub fn new(mapping: Arc<Mapping>, offset: u64, layout: Layout, size: u16) -> Result<Region, RingError> {
        let bytes = inflight_bytes(layout, size.into());
        let have = mapping.len() as u64;
        let outside = RingError::InflightRange { offset, len: bytes, found: have };
        let end = offset.checked_add(bytes).ok_or(outside.clone())?;
        let start = mapping.as_ptr().wrapping_add(offset as usize);
        if end > have || !(start as usize).is_multiple_of(8) {
            return Err(outside);
        }
        let (header, state) = shape(layout);
        Ok(Region { _mapping: mapping, start, header: header as usize, state: state as usize, size })
    }

    /// Whether nothing has been recorded yet: zero is what new memory holds.
    pub fn is_new(&self) -> Result<bool, RingError> {
        let (version, descriptors) = (self.get_u16(VERSION), self.get_u16(DESC_NUM));
        match version {
            0 => Ok(true),
            CURRENT if descriptors == self.size => Ok(false),
            _ => Err(RingError::InflightVersion { version, descriptors, size: self.size.into() }),
        }
    }

    /// Makes the record valid, after everything else in it has been written.
    pub fn finish_new(&self) {
        self.put_u16(DESC_NUM, self.size);
        self.put_u16(VERSION, CURRENT);
    }

    /// Offset of the state of descriptor `index`, which is below the size.
    pub fn state(&self, index: u16) -> usize {
        debug_assert!(index < self.size);
        self.header + self.state * usize::from(index)
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        debug_assert!(offset + size_of::<T>() <= self.header + self.state * usize::from(self.size));
        self.start.wrapping_add(offset).cast()
    }

    pub fn get_u8(&self, offset: usize) -> u8 {
        // SAFETY: offsets of this module lie in the region, which was checked to lie in the mapping.
        unsafe { self.at::<u8>(offset).read_volatile() }
    }

    pub fn get_u16(&self, offset: usize) -> u16 {
        // SAFETY: as above; fields are aligned.
        unsafe { load_u16(self.at(offset), Ordering::Acquire) }
    }

    pub fn get_u32(&self, offset: usize) -> u32 {
        // SAFETY: as above.
        unsafe { load_u32(self.at(offset), Ordering::Acquire) }
    }

    pub fn get_u64(&self, offset: usize) -> u64 {
        // SAFETY: as above.
        unsafe { load_u64(self.at(offset), Ordering::Acquire) }
    }

    pub fn put_u16(&self, offset: usize, value: u16) {
        may_die();
        // SAFETY: as above.
        unsafe { store_u16(self.at(offset), value, Ordering::Release) }
    }

    pub fn put_u32(&self, offset: usize, value: u32) {
        may_die();
        // SAFETY: as above.
        unsafe { store_u32(self.at(offset), value, Ordering::Release) }
    }

    pub fn put_u64(&self, offset: usize, value: u64) {
        may_die();
        // SAFETY: as above.
        unsafe { store_u64(self.at(offset), value, Ordering::Release) }
    }
}
