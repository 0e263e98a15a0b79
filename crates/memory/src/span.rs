//! A checked run of guest bytes.

use std::ptr::NonNull;

use crate::access;

/// A run of guest bytes, contiguous in this process, already checked to lie inside one mapping.
///
/// It says where, not whether: the bytes may change at any moment and may be read or written only while the
/// [`GuestMemory`](crate::GuestMemory) that gave the span is alive, which is what the `unsafe` methods ask for.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    ptr: NonNull<u8>,
    len: u32,
}

// SAFETY: a span is an address and a length; whoever touches the bytes promises at that place that they are mapped.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// A span over `len` bytes from `ptr`.
    #[inline]
    pub const fn new(ptr: NonNull<u8>, len: u32) -> Span {
        Span { ptr, len }
    }

    /// The first byte's address in this process.
    #[inline]
    pub const fn as_ptr(self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// The same, known not to be null.
    #[inline]
    pub const fn start(self) -> NonNull<u8> {
        self.ptr
    }

    /// Length in bytes.
    #[inline]
    pub const fn len(self) -> u32 {
        self.len
    }

    /// Whether the span has no bytes.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The span without its first `by` bytes, of which it must have at least as many.
    #[inline(always)]
    pub const fn skip(self, by: u32) -> Span {
        assert!(by <= self.len);
        match NonNull::new(self.ptr.as_ptr().wrapping_add(by as usize)) {
            Some(ptr) => Span { ptr, len: self.len - by },
            None => panic!("a span that ends at the last address"),
        }
    }

    /// Copies out `buf.len()` bytes that start `offset` bytes into the span.
    ///
    /// # Safety
    /// The memory the span was translated from must be alive. The range must lie inside the span (checked in debug
    /// builds).
    #[inline]
    pub unsafe fn read(self, offset: u32, buf: &mut [u8]) {
        debug_assert!(offset as usize + buf.len() <= self.len as usize);
        // SAFETY: the caller keeps the mapping alive and the range inside it; `buf` is ours alone.
        unsafe { access::copy(buf.as_mut_ptr(), self.as_ptr().add(offset as usize), buf.len()) }
    }

    /// Copies `buf` in, `offset` bytes into the span.
    ///
    /// # Safety
    /// As for [`read`](Span::read).
    #[inline]
    pub unsafe fn write(self, offset: u32, buf: &[u8]) {
        debug_assert!(offset as usize + buf.len() <= self.len as usize);
        // SAFETY: the caller keeps the mapping alive and the range inside it.
        unsafe { access::copy(self.as_ptr().add(offset as usize), buf.as_ptr(), buf.len()) }
    }
}
