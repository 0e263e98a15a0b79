//! A guest's memory with guards: what lies beyond either end is ours to watch, and must never change.
//!
//! A file is mapped twice. The guest's memory is two regions, side by side in guest-physical addresses, so that buffers
//! cross from one into the other; it begins [`GUARD`] bytes into the file and ends as many before the file does. The whole
//! file, guards included, is mapped once more for the peer that plays the guest.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use viaduct_memory::{GuestMemory, Mapping, RegionSpec, Span};

/// Bytes at either end that nobody may touch.
pub const GUARD: usize = 64;
/// Bytes of guest memory.
pub const SIZE: u64 = (1 << 16) - 2 * GUARD as u64;
/// Where the second region begins.
pub const SECOND: u64 = 1 << 15;
/// Front-end-virtual minus guest-physical address: a confusion of the two shows.
pub const USER: u64 = 1 << 40;
/// What the guards are filled with.
const MARK: u8 = 0xc5;

/// The memory of one guest, used again for every input.
pub struct Guest {
    /// As the switch sees it.
    pub memory: GuestMemory,
    /// The first of the two regions alone.
    pub half: GuestMemory,
    file: Mapping,
}

/// An anonymous file of `size` bytes.
///
/// # Panics
/// When the system has none to give.
pub fn file(size: u64) -> OwnedFd {
    // SAFETY: a fresh descriptor, taken over at once and sized before anyone sees it.
    unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create");
        let owned = OwnedFd::from_raw_fd(fd);
        assert_eq!(libc::ftruncate(fd, size as libc::off_t), 0);
        owned
    }
}

impl Default for Guest {
    fn default() -> Guest {
        let fd = file(SIZE + 2 * GUARD as u64);
        let region = |start: u64, end: u64| RegionSpec {
            guest_addr: start,
            size: end - start,
            user_addr: USER + start,
            mmap_offset: GUARD as u64 + start,
        };
        let copy = || fd.try_clone().expect("a descriptor");
        let half = GuestMemory::new().with_region(region(0, SECOND), copy()).expect("a legal region");
        let memory = half.with_region(region(SECOND, SIZE), copy()).expect("a legal region");
        let file = Mapping::new(fd.as_fd(), 0, SIZE + 2 * GUARD as u64).expect("a legal mapping");
        Guest { memory, half, file }
    }
}

impl Guest {
    /// All zeroes, guards whole.
    pub fn reset(&self) {
        // SAFETY: our own mapping, which nothing else uses between two inputs.
        unsafe {
            let start = self.file.as_ptr();
            start.write_bytes(MARK, GUARD);
            start.add(GUARD).write_bytes(0, SIZE as usize);
            start.add(GUARD + SIZE as usize).write_bytes(MARK, GUARD);
        }
    }

    /// Panics if a guard has changed.
    pub fn check(&self) {
        for offset in (0..GUARD).chain(GUARD + SIZE as usize..2 * GUARD + SIZE as usize) {
            // SAFETY: inside our own mapping.
            let found = unsafe { self.file.as_ptr().add(offset).read_volatile() };
            assert_eq!(found, MARK, "the byte at {offset:#x} of the file is outside of the guest's memory");
        }
    }

    /// Writes what of `bytes` lies in the guest's memory from `addr` on.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let len = bytes.len().min(SIZE.saturating_sub(addr) as usize);
        // SAFETY: inside our own mapping.
        unsafe {
            let to = self.file.as_ptr().add(GUARD + addr.min(SIZE) as usize);
            to.copy_from_nonoverlapping(bytes.as_ptr(), len);
        }
    }

    /// Reads what lies in the guest's memory.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.min(SIZE.saturating_sub(addr) as usize)];
        // SAFETY: inside our own mapping.
        unsafe {
            let from = self.file.as_ptr().add(GUARD + addr.min(SIZE) as usize);
            from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
        }
        bytes
    }

    /// Panics unless `span` lies in one of the two regions. Each is a mapping of its own, so this asks the memory.
    pub fn check_span(&self, span: Span) {
        let inside = |region: &RegionSpec| {
            let len = region.size as u32;
            let whole = self.memory.translate(&mut Default::default(), region.guest_addr, len).expect("a region");
            let (start, from) = (whole.as_ptr() as u64, span.as_ptr() as u64);
            from >= start && from + u64::from(span.len()) <= start + region.size
        };
        assert!(self.memory.regions().any(inside), "a span outside of the guest's memory: {span:?}");
    }
}

impl Guest {
    /// The guest-physical address of a span's first byte.
    pub fn place(&self, span: Span) -> u64 {
        let place = |region: &RegionSpec| {
            let len = region.size as u32;
            let whole = self.memory.translate(&mut Default::default(), region.guest_addr, len).expect("a region");
            let offset = (span.as_ptr() as u64).wrapping_sub(whole.as_ptr() as u64);
            (offset < region.size).then_some(region.guest_addr + offset)
        };
        self.memory.regions().find_map(place).expect("a span outside of the guest's memory")
    }
}

/// Memory for a record of chains in flight, holding `bytes` and zeroes.
pub fn record(size: u64, bytes: &[u8]) -> Arc<Mapping> {
    let mapping = Mapping::new(file(size).as_fd(), 0, size).expect("a legal mapping");
    // SAFETY: our own fresh mapping.
    unsafe { mapping.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len().min(size as usize)) };
    Arc::new(mapping)
}
