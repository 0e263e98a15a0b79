//! How guest bytes are touched: words, opaque copies and prefetches, through raw pointers.
//!
//! # Theory of operation
//!
//! The bytes are shared with another process that may write them at any moment. To the language that is a data race for
//! every plain load, and the compiler may take a plain load twice or guess what it gives. So there are three ways, and
//! no others:
//!
//! - *Words* (ring indices, flags, descriptor fields) are loaded and stored as atomics of their own width, with the
//!   ordering that the caller names, if the place is aligned; fields of packet headers, which need not be, by one
//!   volatile access. Everything in a virtqueue is little-endian (virtio 1.2, 1.4); these functions convert.
//! - *Runs* (headers, frames) are [`copy`]-ed by instructions the compiler cannot see into. Any alignment, any torn
//!   value: check the copy, never the original.
//! - *Prefetches*, which touch nothing.

mod copy;

pub use copy::copy;

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

pub use crate::span::Span;

macro_rules! words {
    ($($int:ty, $atomic:ty, $bytes:literal, $mov:literal:
        $load:ident, $store:ident, $load_any:ident, $store_any:ident;)*) => {$(
        #[doc = concat!("Loads the little-endian `", stringify!($int), "` at `ptr`.")]
        ///
        /// # Safety
        #[doc = concat!("`ptr` must be aligned to ", $bytes, " bytes (checked in debug builds) and mapped for reads.")]
        ///
        /// # Panics
        /// If `order` is [`Ordering::Release`] or [`Ordering::AcqRel`], which a load cannot have.
        #[inline(always)]
        pub unsafe fn $load(ptr: *const $int, order: Ordering) -> $int {
            debug_assert_eq!(ptr as usize % $bytes, 0, "misaligned load");
            // SAFETY: aligned and mapped, says the caller. An atomic may be written by others while it is shared, and
            // this one ends with the statement.
            <$int>::from_le(unsafe { <$atomic>::from_ptr(ptr.cast_mut()) }.load(order))
        }

        #[doc = concat!("Stores a `", stringify!($int), "` at `ptr` as little-endian.")]
        ///
        /// # Safety
        #[doc = concat!("`ptr` must be aligned to ", $bytes, " bytes (checked in debug builds) and mapped for writes.")]
        ///
        /// # Panics
        /// If `order` is [`Ordering::Acquire`] or [`Ordering::AcqRel`], which a store cannot have.
        #[inline(always)]
        pub unsafe fn $store(ptr: *mut $int, value: $int, order: Ordering) {
            debug_assert_eq!(ptr as usize % $bytes, 0, "misaligned store");
            // SAFETY: as for the load.
            unsafe { <$atomic>::from_ptr(ptr) }.store(value.to_le(), order);
        }

        #[doc = concat!("Loads the little-endian `", stringify!($int), "` at `ptr`, in one access, at any alignment.")]
        ///
        /// # Safety
        #[doc = concat!("`ptr` must be mapped for reads over ", $bytes, " bytes.")]
        #[inline(always)]
        pub unsafe fn $load_any(ptr: *const u8) -> $int {
            // SAFETY: mapped, says the caller; the packed wrapper has alignment 1 and any bytes are a valid integer.
            <$int>::from_le(unsafe { ptr.cast::<Unaligned<$int>>().read_volatile() }.0)
        }

        #[doc = concat!("Stores a `", stringify!($int), "` at `ptr` as little-endian, in one access, at any alignment.")]
        ///
        /// # Safety
        #[doc = concat!("`ptr` must be mapped for writes over ", $bytes, " bytes.")]
        #[inline(always)]
        pub unsafe fn $store_any(ptr: *mut u8, value: $int) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: mapped, says the caller. A volatile store of a packed structure would go by way of the stack.
            unsafe {
                std::arch::asm!($mov, ptr = in(reg) ptr, value = in(reg) value, options(nostack, preserves_flags));
            }
            #[cfg(not(target_arch = "x86_64"))]
            // SAFETY: mapped, says the caller; the packed wrapper has alignment 1.
            unsafe {
                ptr.cast::<Unaligned<$int>>().write_volatile(Unaligned(value.to_le()));
            }
        }
    )*};
}

/// A word at any address.
#[repr(C, packed)]
struct Unaligned<T>(T);

words! {
    u16, AtomicU16, 2, "mov word ptr [{ptr}], {value:x}":
        load_u16, store_u16, load_u16_unaligned, store_u16_unaligned;
    u32, AtomicU32, 4, "mov dword ptr [{ptr}], {value:e}":
        load_u32, store_u32, load_u32_unaligned, store_u32_unaligned;
    u64, AtomicU64, 8, "mov qword ptr [{ptr}], {value}":
        load_u64, store_u64, load_u64_unaligned, store_u64_unaligned;
}

/// Copies out the `N` bytes at `ptr`, which need not be aligned. `N` is small: a header, a descriptor.
///
/// # Safety
/// `ptr` must be mapped for reads over `N` bytes.
#[inline(always)]
pub unsafe fn read_bytes<const N: usize>(ptr: *const u8) -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: the caller's promise; `bytes` is ours alone.
    unsafe { copy(bytes.as_mut_ptr(), ptr, N) };
    bytes
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
    // SAFETY: a hint; it cannot fault, and processors without it take it for a no-op.
    unsafe {
        std::arch::asm!("prefetchw [{0}]", in(reg) ptr, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_little_endian() {
        #[repr(align(8))]
        struct Aligned([u8; 16]);
        let mut place = Aligned([0; 16]);
        let ptr = place.0.as_mut_ptr();
        // SAFETY: aligned to 8 and 16 bytes long.
        unsafe {
            store_u64(ptr.cast(), 0x0807_0605_0403_0201, Ordering::Relaxed);
            store_u32(ptr.add(8).cast(), 0x0c0b_0a09, Ordering::Release);
            store_u16(ptr.add(12).cast(), 0x0e0d, Ordering::SeqCst);
            assert_eq!(load_u64(ptr.cast(), Ordering::Acquire), 0x0807_0605_0403_0201);
            assert_eq!(load_u32(ptr.add(4).cast(), Ordering::Relaxed), 0x0807_0605);
            assert_eq!(load_u16(ptr.add(12).cast(), Ordering::SeqCst), 0x0e0d);
            assert_eq!(load_u64_unaligned(ptr.add(3)), 0x0b0a_0908_0706_0504);
            assert_eq!(load_u32_unaligned(ptr.add(1)), 0x0504_0302);
            store_u16_unaligned(ptr.add(13), 0x0f0e);
            assert_eq!(load_u16_unaligned(ptr.add(13)), 0x0f0e);
            assert_eq!(read_bytes::<5>(ptr.add(3)), [4, 5, 6, 7, 8]);
        }
        assert_eq!(place.0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0]);
    }
}
