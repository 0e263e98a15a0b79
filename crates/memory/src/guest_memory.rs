//! The two address spaces of a front-end, as one immutable table.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::{Mapping, Span};

/// A region as the front-end describes it (vhost-user, "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest-physical address of the first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Front-end-virtual address of the first byte.
    pub user_addr: u64,
    /// Where in the file the first byte lies.
    pub mmap_offset: u64,
}

/// Why a region was refused, or an address has no translation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The region has no bytes.
    #[error("region at guest address {0:#x} is empty")]
    Empty(u64),
}

/// The last region a translation hit: most descriptors of a queue lie in the same one.
#[derive(Clone, Copy, Debug)]
pub struct RegionCache {
    start: u64,
    size: u64,
    host: usize,
}

impl Default for RegionCache {
    fn default() -> RegionCache {
        RegionCache { start: 0, size: 0, host: 0 }
    }
}

#[derive(Debug)]
struct Region {
    spec: RegionSpec,
    #[allow(dead_code)]
    mapping: Arc<Mapping>,
    host: usize,
}

/// An immutable table of regions. Cloning is one reference count.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    regions: Arc<[Arc<Region>]>,
}

impl GuestMemory {
    /// A memory with no regions: every translation fails.
    pub fn new() -> GuestMemory {
        GuestMemory::default()
    }

    /// The same memory with one more region, mapped from `file`.
    pub fn with_region(&self, _spec: RegionSpec, _file: OwnedFd) -> Result<GuestMemory, MemoryError> {
        todo!()
    }

    /// The same memory without the region that has exactly these addresses and size (vhost-user REM_MEM_REG).
    pub fn without_region(&self, _spec: &RegionSpec) -> Result<GuestMemory, MemoryError> {
        todo!()
    }

    /// The regions, ordered by guest-physical address.
    pub fn regions(&self) -> impl Iterator<Item = &RegionSpec> {
        self.regions.iter().map(|r| &r.spec)
    }

    /// Whether an access to one of the mappings has faulted since it was made (the file was truncated): the memory reads
    /// as zeroes there and its owner has to be cut off.
    pub fn faulted(&self) -> bool {
        false
    }

    /// The guest-physical range `addr .. addr + len` as a span, if it lies inside one region. `len` may be zero.
    #[inline]
    pub fn translate(&self, cache: &mut RegionCache, addr: u64, len: u32) -> Option<Span> {
        let offset = addr.wrapping_sub(cache.start);
        if offset < cache.size && u64::from(len) <= cache.size - offset {
            let host = NonNull::new((cache.host + offset as usize) as *mut u8)?;
            return Some(Span::new(host, len));
        }
        self.translate_slow(cache, addr, len)
    }

    /// Like [`translate`](GuestMemory::translate), but the span ends where the region ends: for a buffer that crosses
    /// from one region into the next the caller asks again for the rest. Never returns an empty span for `len > 0`.
    pub fn translate_some(&self, _cache: &mut RegionCache, _addr: u64, _len: u32) -> Option<Span> {
        todo!()
    }

    /// The front-end-virtual range `addr .. addr + len` as a span, if it lies inside one region.
    pub fn translate_user(&self, _addr: u64, _len: u32) -> Option<Span> {
        todo!()
    }

    #[cold]
    fn translate_slow(&self, cache: &mut RegionCache, addr: u64, len: u32) -> Option<Span> {
        let region = self.regions.iter().find(|r| addr.wrapping_sub(r.spec.guest_addr) < r.spec.size)?;
        *cache = RegionCache { start: region.spec.guest_addr, size: region.spec.size, host: region.host };
        let offset = addr - cache.start;
        if u64::from(len) > cache.size - offset {
            return None;
        }
        Some(Span::new(NonNull::new((cache.host + offset as usize) as *mut u8)?, len))
    }
}
