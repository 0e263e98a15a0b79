//! How guest bytes are touched: opaque copies and prefetches through raw pointers.

use std::ptr::NonNull;

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
        // SAFETY: `by` is within the span, which lies inside one mapping.
        Span { ptr: unsafe { self.ptr.add(by as usize) }, len: self.len - by }
    }

    /// Copies out `buf.len()` bytes that start `offset` bytes into the span.
    ///
    /// # Safety
    /// The memory the span was translated from must be alive. The range must lie inside the span (checked in debug builds).
    #[inline]
    pub unsafe fn read(self, offset: u32, buf: &mut [u8]) {
        debug_assert!(offset as usize + buf.len() <= self.len as usize);
        // SAFETY: the caller keeps the mapping alive and the range inside it; `buf` is ours alone.
        unsafe { copy(buf.as_mut_ptr(), self.as_ptr().add(offset as usize), buf.len()) }
    }

    /// Copies `buf` in, `offset` bytes into the span.
    ///
    /// # Safety
    /// As for [`read`](Span::read).
    #[inline]
    pub unsafe fn write(self, offset: u32, buf: &[u8]) {
        debug_assert!(offset as usize + buf.len() <= self.len as usize);
        // SAFETY: the caller keeps the mapping alive and the range inside it.
        unsafe { copy(self.as_ptr().add(offset as usize), buf.as_ptr(), buf.len()) }
    }
}

/// Copies `len` bytes between places of which either may be guest memory that others write at the same time.
///
/// # Safety
/// `src` must be mapped for reads and `dst` for writes over `len` bytes, and they must not overlap.
#[inline]
pub unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: given by the caller.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, len) }
}

/// Asks for the cache line at `ptr` in order to read it. Any address will do: a prefetch never faults.
#[inline(always)]
pub fn prefetch_read(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it cannot fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// Asks for the cache line at `ptr` in order to write it. Any address will do: a prefetch never faults.
#[inline(always)]
pub fn prefetch_write(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it cannot fault.
    unsafe {
        std::arch::asm!("prefetchw [{0}]", in(reg) ptr, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// Atomic loads and stores of ring fields through raw pointers, little-endian as virtio wants them (virtio 1.2, 1.4).
/// The reference to an atomic that each makes for one instruction is the only kind that may point into guest memory.
macro_rules! atomic_access {
    ($load:ident, $store:ident, $int:ty, $atomic:ty) => {
        /// Loads a little-endian value atomically.
        ///
        /// # Safety
        /// `ptr` must be aligned to the size of the value and mapped for reads.
        #[inline(always)]
        pub unsafe fn $load(ptr: *const $int, order: std::sync::atomic::Ordering) -> $int {
            // SAFETY: aligned and mapped, says the caller; the other side changes it by plain or atomic stores of its own.
            <$int>::from_le(unsafe { <$atomic>::from_ptr(ptr.cast_mut()) }.load(order))
        }

        /// Stores a little-endian value atomically.
        ///
        /// # Safety
        /// `ptr` must be aligned to the size of the value and mapped for writes.
        #[inline(always)]
        pub unsafe fn $store(ptr: *mut $int, value: $int, order: std::sync::atomic::Ordering) {
            // SAFETY: aligned and mapped, says the caller.
            unsafe { <$atomic>::from_ptr(ptr) }.store(value.to_le(), order)
        }
    };
}

atomic_access!(load_u16, store_u16, u16, std::sync::atomic::AtomicU16);
atomic_access!(load_u32, store_u32, u32, std::sync::atomic::AtomicU32);
atomic_access!(load_u64, store_u64, u64, std::sync::atomic::AtomicU64);

/// Loads and stores of a value at any address, each once and as a whole, little-endian: packet headers, which are not
/// aligned and which the other side may be changing.
macro_rules! unaligned_access {
    ($load:ident, $store:ident, $int:ty) => {
        /// Loads a little-endian value from any address.
        ///
        /// # Safety
        /// `ptr` must be mapped for reads over the size of the value.
        #[inline(always)]
        pub unsafe fn $load(ptr: *const u8) -> $int {
            // SAFETY: mapped, says the caller; the packed wrapper has alignment 1 and any bytes are a valid integer.
            <$int>::from_le(unsafe { ptr.cast::<Unaligned<$int>>().read_volatile() }.0)
        }

        /// Stores a little-endian value at any address.
        ///
        /// # Safety
        /// `ptr` must be mapped for writes over the size of the value.
        #[inline(always)]
        pub unsafe fn $store(ptr: *mut u8, value: $int) {
            // SAFETY: mapped, says the caller; the packed wrapper has alignment 1.
            unsafe { ptr.cast::<Unaligned<$int>>().write_volatile(Unaligned(value.to_le())) }
        }
    };
}

#[repr(C, packed)]
struct Unaligned<T>(T);

unaligned_access!(load_u16_unaligned, store_u16_unaligned, u16);
unaligned_access!(load_u32_unaligned, store_u32_unaligned, u32);
unaligned_access!(load_u64_unaligned, store_u64_unaligned, u64);
