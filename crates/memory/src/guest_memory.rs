//! The two address spaces of a front-end, as one immutable table.
//!
//! # Theory of operation
//!
//! Regions are kept in the order of their guest-physical addresses; they never overlap in either space. A translation
//! first tries the region of the last one ([`RegionCache`], one per queue), because most descriptors of a queue lie in
//! the same region, and searches by halves otherwise. Front-end-virtual addresses appear only when a queue is set up
//! (SET_VRING_ADDR), so those are looked up one by one.
//!
//! A table never changes and has a number of its own, which a cache remembers: a cache filled from one table finds
//! nothing in another one, so a stale cache cannot give out an address that has been unmapped since.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::iotlb::{Access, Iotlb, Miss, Permissions, Unreachable};
use crate::mapping::memfd;
use crate::{DirtyLog, Mapping, MappingError, Span, fault};

/// Most regions a memory may have: the number of slots of KVM's memory map on x86, which is what front-ends ask for
/// (vhost-user, VHOST_USER_GET_MAX_MEM_SLOTS).
pub const MAX_REGIONS: usize = 509;

/// Guest address, user address and place in our memory agree in this many low bits' worth: the strictest alignment of a
/// virtqueue's parts (virtio 1.2, 2.7), so that what is aligned for the driver is aligned for us.
const CONGRUENCE: u64 = 16;

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

impl fmt::Display for RegionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RegionSpec { guest_addr, size, user_addr, mmap_offset } = self;
        write!(f, "region guest {guest_addr:#x} size {size:#x} user {user_addr:#x} offset {mmap_offset:#x}")
    }
}

impl RegionSpec {
    fn addr(&self, space: AddressSpace) -> u64 {
        match space {
            AddressSpace::Guest => self.guest_addr,
            AddressSpace::User => self.user_addr,
        }
    }

    /// Offset of `addr` from the region's start, if it lies inside.
    #[inline]
    fn offset_of(&self, space: AddressSpace, addr: u64) -> Option<u64> {
        let offset = addr.wrapping_sub(self.addr(space));
        (offset < self.size).then_some(offset)
    }
}

/// One of the two spaces in which a region has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSpace {
    /// Guest-physical: what the driver puts into descriptors.
    Guest,
    /// Front-end-virtual: what the front-end says where a queue lies.
    User,
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AddressSpace::Guest => "guest-physical",
            AddressSpace::User => "front-end-virtual",
        })
    }
}

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The region has no bytes.
    #[error("{0} is empty; a region has at least 1 byte (vhost-user, \"Memory region description\")")]
    Empty(RegionSpec),
    /// The region goes beyond the last address there is.
    #[error("{region} ends beyond 2^64 in the {space} space (vhost-user, \"Memory region description\")")]
    Overflow {
        /// The region refused.
        region: RegionSpec,
        /// The space in which it does not fit.
        space: AddressSpace,
    },
    /// The region's addresses are aligned differently.
    #[error(
        "{0}: guest address, user address and mmap offset differ modulo 16, so a virtqueue aligned in one would not be in \
         the others (virtio 1.2, 2.7)"
    )]
    Misaligned(RegionSpec),
    /// The region shares addresses with one that is there already.
    #[error(
        "{region} overlaps {other} in the {space} space; remove that one first (vhost-user, VHOST_USER_REM_MEM_REG)"
    )]
    Overlap {
        /// The region refused.
        region: RegionSpec,
        /// The one that is there.
        other: RegionSpec,
        /// The space in which they meet.
        space: AddressSpace,
    },
    /// All slots are taken.
    #[error("{0} is one too many: {MAX_REGIONS} are allowed (vhost-user, VHOST_USER_GET_MAX_MEM_SLOTS)")]
    TooMany(RegionSpec),
    /// There is no such region to remove.
    #[error("no region has guest address, size and user address of {0} (vhost-user, VHOST_USER_REM_MEM_REG)")]
    NoSuchRegion(RegionSpec),
    /// The log of written pages ends before the region does.
    #[error(
        "{region} ends beyond {end:#x}, up to where the log has bits, one for each 4096 bytes; make the log larger first \
         (vhost-user, \"Migration\")"
    )]
    NotLogged {
        /// The region whose end has no bits.
        region: RegionSpec,
        /// The first address without one.
        end: u128,
    },
    /// Its file cannot be mapped.
    #[error("{region}: {source} (vhost-user, \"Memory region description\")")]
    Mapping {
        /// The region refused.
        region: RegionSpec,
        /// What is wrong with the file.
        source: MappingError,
    },
}

/// The last region a translation hit. Make one per queue; it serves any number of tables, one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegionCache {
    /// The table it was filled from; 0: none.
    table: u64,
    start: u64,
    size: u64,
    host: usize,
    /// Behind an IOMMU: the table again, so that [`translate`](GuestMemory::translate) never finds it, what is allowed, and
    /// [`Iotlb::removals`] when it was found.
    translated: u64,
    permissions: Permissions,
    removals: u64,
    refused: Option<Miss>,
}

impl RegionCache {
    /// Behind an IOMMU: the front-end has said that there is no translation for this; it is not to be asked for again.
    pub fn set_refused(&mut self, miss: Option<Miss>) {
        self.refused = miss;
    }
}

/// One region as values that a loop can keep in registers: for runs of buffers that nearly always lie in the same one.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    start: u64,
    size: u64,
    host: usize,
}

impl Window {
    /// The guest-physical range `addr .. addr + len` as a span, if it lies inside the region and is not empty.
    #[inline(always)]
    pub fn span(self, addr: u64, len: u32) -> Option<Span> {
        let offset = addr.wrapping_sub(self.start);
        // An empty range wraps, and is longer than any region.
        if offset >= self.size || u64::from(len).wrapping_sub(1) >= self.size - offset {
            return None;
        }
        // SAFETY: the place lies inside a mapping of this process, which begins above address 0.
        Some(unsafe { Span::new(NonNull::new_unchecked(place(self.host, offset)), len) })
    }
}

#[derive(Clone, Debug)]
struct Region {
    spec: RegionSpec,
    mapping: Arc<Mapping>,
}

impl Region {
    fn host(&self) -> usize {
        self.mapping.as_ptr().expose_provenance()
    }
}

/// An immutable table of regions. Cloning is one reference count, or two.
#[derive(Clone, Default)]
pub struct GuestMemory {
    /// Different for every table that has regions; 0 for those that have none.
    table: u64,
    regions: Arc<[Region]>,
    /// Addresses in descriptors and of rings are I/O virtual and go through it.
    iotlb: Option<Arc<Iotlb>>,
    logged: Option<Arc<Logged>>,
}

/// A log of written pages, and what finds the guest's address of a place in this process.
struct Logged {
    log: DirtyLog,
    /// Regions by their addresses in this process: address, length, guest-physical address.
    places: Box<[(usize, u64, u64)]>,
}

static TABLES: AtomicU64 = AtomicU64::new(0);

impl GuestMemory {
    /// A memory with no regions: every translation fails.
    pub fn new() -> GuestMemory {
        GuestMemory::default()
    }

    /// A memory of our own: one region of `size` bytes, zeroes, at address 0 of both spaces.
    ///
    /// # Errors
    /// [`MemoryError::Empty`] or [`MemoryError::Mapping`] if there is no memory.
    pub fn allocate(size: u64) -> Result<GuestMemory, MemoryError> {
        let region = RegionSpec { guest_addr: 0, size, user_addr: 0, mmap_offset: 0 };
        let file = memfd(size).map_err(|error| {
            let source = MappingError::System { call: "memfd_create", offset: 0, len: size, error };
            MemoryError::Mapping { region, source }
        })?;
        GuestMemory::new().with_region(region, file)
    }

    /// The same memory with one more region, mapped from `file`, and without a log. The descriptor is closed.
    ///
    /// # Errors
    /// Every [`MemoryError`] but [`NoSuchRegion`](MemoryError::NoSuchRegion).
    pub fn with_region(&self, spec: RegionSpec, file: OwnedFd) -> Result<GuestMemory, MemoryError> {
        self.with_mapping(spec, |spec| Mapping::new(file.as_fd(), spec.mmap_offset, spec.size))
    }

    /// The same for a `file` that only gives the first content ([`Mapping::private`]): nobody else sees the region.
    ///
    /// # Errors
    /// As for [`with_region`](GuestMemory::with_region).
    pub fn with_private_region(&self, spec: RegionSpec, file: OwnedFd) -> Result<GuestMemory, MemoryError> {
        self.with_mapping(spec, |spec| Mapping::private(file.as_fd(), spec.mmap_offset, spec.size))
    }

    /// The same for memory that is no file's ([`Mapping::anonymous`]): zeroes, which nobody else sees.
    ///
    /// # Errors
    /// As for [`with_region`](GuestMemory::with_region).
    pub fn with_anonymous_region(&self, spec: RegionSpec) -> Result<GuestMemory, MemoryError> {
        self.with_mapping(spec, |spec| Mapping::anonymous(spec.size))
    }

    fn with_mapping(
        &self,
        spec: RegionSpec,
        map: impl FnOnce(&RegionSpec) -> Result<Mapping, MappingError>,
    ) -> Result<GuestMemory, MemoryError> {
        self.check(&spec)?;
        let mapping = map(&spec).map_err(|source| MemoryError::Mapping { region: spec, source })?;
        let at = self.regions.partition_point(|other| other.spec.guest_addr < spec.guest_addr);
        let new = Region { spec, mapping: Arc::new(mapping) };
        let (below, above) = self.regions.split_at(at);
        let regions = below.iter().cloned().chain([new]).chain(above.iter().cloned()).collect();
        Ok(GuestMemory::from_regions(regions, self.iotlb.clone()))
    }

    /// The same memory without the region that has exactly these addresses and size, and without a log; `mmap_offset` does
    /// not count (vhost-user, VHOST_USER_REM_MEM_REG).
    ///
    /// # Errors
    /// [`MemoryError::NoSuchRegion`].
    pub fn without_region(&self, spec: &RegionSpec) -> Result<GuestMemory, MemoryError> {
        let key = |spec: &RegionSpec| (spec.guest_addr, spec.size, spec.user_addr);
        let at = self.regions.iter().position(|region| key(&region.spec) == key(spec));
        let at = at.ok_or(MemoryError::NoSuchRegion(*spec))?;
        let (below, above) = (&self.regions[..at], &self.regions[at + 1..]);
        Ok(GuestMemory::from_regions(below.iter().chain(above).cloned().collect(), self.iotlb.clone()))
    }

    /// The same memory, of which `log` is told what the device writes (vhost-user, "Migration"); `None` ends that.
    ///
    /// # Errors
    /// [`MemoryError::NotLogged`].
    pub fn with_log(&self, log: Option<DirtyLog>) -> Result<GuestMemory, MemoryError> {
        let Some(log) = log else { return Ok(GuestMemory { logged: None, ..self.clone() }) };
        let uncovered = self.regions().find(|spec| !log.covers(spec.guest_addr, spec.size));
        if let Some(&region) = uncovered {
            return Err(MemoryError::NotLogged { region, end: log.end() });
        }
        let mut places: Box<[_]> =
            self.regions.iter().map(|region| (region.host(), region.spec.size, region.spec.guest_addr)).collect();
        places.sort_unstable();
        Ok(GuestMemory { logged: Some(Arc::new(Logged { log, places })), ..self.clone() })
    }

    /// The log of written pages, while there is one.
    #[inline]
    pub fn log(&self) -> Option<&DirtyLog> {
        self.logged.as_ref().map(|logged| &logged.log)
    }

    /// Marks the first `len` bytes of `span`, which was translated by this memory and written before, in the log, if there
    /// is one.
    #[inline]
    pub fn mark_written(&self, span: Span, len: u32) {
        if let Some(logged) = &self.logged
            && let Some(addr) = logged.guest_addr(span.as_ptr())
        {
            logged.log.mark(addr, len.min(span.len()).into());
        }
    }

    /// The guest-physical address of a place that a translation gave, while there is a log.
    pub fn logged_addr(&self, place: *const u8) -> Option<u64> {
        self.logged.as_ref().and_then(|logged| logged.guest_addr(place))
    }

    /// The same memory behind an IOMMU: it is reached by I/O virtual addresses, through [`reach`](GuestMemory::reach) only.
    pub fn behind(&self, iotlb: Arc<Iotlb>) -> GuestMemory {
        let logged = self.logged.clone();
        GuestMemory { logged, ..GuestMemory::from_regions(self.regions.clone(), Some(iotlb)) }
    }

    /// The IOMMU's translations, if there is one.
    #[inline]
    pub fn iotlb(&self) -> Option<&Arc<Iotlb>> {
        self.iotlb.as_ref()
    }

    fn from_regions(regions: Arc<[Region]>, iotlb: Option<Arc<Iotlb>>) -> GuestMemory {
        let table = if regions.is_empty() { 0 } else { TABLES.fetch_add(1, Ordering::Relaxed) + 1 };
        GuestMemory { table, regions, iotlb, logged: None }
    }

    fn check(&self, spec: &RegionSpec) -> Result<(), MemoryError> {
        if spec.size == 0 {
            return Err(MemoryError::Empty(*spec));
        }
        for space in [AddressSpace::Guest, AddressSpace::User] {
            // The last byte, not the one behind it: a region may end at 2^64.
            let (first, Some(last)) = (spec.addr(space), spec.addr(space).checked_add(spec.size - 1)) else {
                return Err(MemoryError::Overflow { region: *spec, space });
            };
            for Region { spec: other, .. } in self.regions.iter() {
                if first <= other.addr(space) + (other.size - 1) && other.addr(space) <= last {
                    return Err(MemoryError::Overlap { region: *spec, other: *other, space });
                }
            }
        }
        if [spec.user_addr, spec.mmap_offset].iter().any(|addr| !(addr ^ spec.guest_addr).is_multiple_of(CONGRUENCE)) {
            return Err(MemoryError::Misaligned(*spec));
        }
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany(*spec));
        }
        Ok(())
    }

    /// The regions, ordered by guest-physical address.
    pub fn regions(&self) -> impl Iterator<Item = &RegionSpec> {
        self.regions.iter().map(|region| &region.spec)
    }

    /// Whether an access to one of the mappings has faulted since it was made (the file was truncated): the memory
    /// reads as zeroes there and its owner has to be cut off. The log counts too. One load as long as no mapping of the
    /// process has faulted.
    #[inline]
    pub fn faulted(&self) -> bool {
        fault::count() != 0
            && (self.regions.iter().any(|region| region.mapping.faulted()) || self.log().is_some_and(DirtyLog::faulted))
    }

    /// The guest-physical range `addr .. addr + len` as a span, if it lies inside one region. `len` may be zero. Always none
    /// behind an IOMMU: then it is [`reach`](GuestMemory::reach) that checks what may be done there.
    #[inline]
    pub fn translate(&self, cache: &mut RegionCache, addr: u64, len: u32) -> Option<Span> {
        let mut offset = addr.wrapping_sub(cache.start);
        if cache.table != self.table || offset >= cache.size {
            *cache = self.find(addr)?;
            offset = addr - cache.start;
        }
        if u64::from(len) > cache.size - offset {
            return None;
        }
        span(cache.host, offset, len)
    }

    /// The region of the last translation with this cache; one without bytes if that was in another table.
    #[inline]
    pub fn window(&self, cache: &RegionCache) -> Window {
        let size = if cache.table == self.table { cache.size } else { 0 };
        Window { start: cache.start, size, host: cache.host }
    }

    /// Like [`translate`](GuestMemory::translate), but the span ends where the region ends: for a buffer that crosses
    /// from one region into the next the caller asks again for the rest. Never returns an empty span for `len > 0`.
    #[inline]
    pub fn translate_some(&self, cache: &mut RegionCache, addr: u64, len: u32) -> Option<Span> {
        let mut offset = addr.wrapping_sub(cache.start);
        if cache.table != self.table || offset >= cache.size {
            *cache = self.find(addr)?;
            offset = addr - cache.start;
        }
        let rest = u32::try_from(cache.size - offset).unwrap_or(u32::MAX);
        span(cache.host, offset, len.min(rest))
    }

    /// As many of the bytes from `addr` on as lie together, at least one and at most `len`, for this access: guest-physical
    /// addresses, or I/O virtual ones behind an IOMMU. `len` is not zero.
    ///
    /// # Errors
    /// [`Unreachable`]; a miss is not put down by that.
    pub fn reach(&self, cache: &mut RegionCache, addr: u64, len: u32, access: Access) -> Result<Span, Unreachable> {
        let Some(iotlb) = &self.iotlb else {
            return self.translate_some(cache, addr, len).ok_or(Unreachable::Outside);
        };
        let removals = iotlb.removals();
        let mut offset = addr.wrapping_sub(cache.start);
        if (cache.translated, cache.removals) != (self.table, removals)
            || offset >= cache.size
            || !cache.permissions.allow(access)
        {
            let refused = cache.refused;
            *cache = self.find_translated(iotlb, addr, access, removals).map_err(|why| match why {
                Unreachable::Missing(miss) if refused == Some(miss) => Unreachable::Refused,
                why => why,
            })?;
            cache.refused = refused;
            offset = addr - cache.start;
        }
        let rest = u32::try_from(cache.size - offset).unwrap_or(u32::MAX);
        span(cache.host, offset, len.min(rest)).ok_or(Unreachable::Outside)
    }

    /// What lies together around an I/O virtual address: the part of its translation that one region holds.
    #[cold]
    fn find_translated(
        &self,
        iotlb: &Iotlb,
        addr: u64,
        access: Access,
        removals: u64,
    ) -> Result<RegionCache, Unreachable> {
        let range = iotlb.find(addr, access)?;
        let user = range.user_addr + (addr - range.iova);
        let found =
            self.regions.iter().find_map(|region| Some((region.spec.offset_of(AddressSpace::User, user)?, region)));
        let (offset, region) = found.ok_or_else(|| iotlb.forbid(Miss::at(addr, access)))?;
        let before = offset.min(addr - range.iova);
        let after = (region.spec.size - 1 - offset).min(range.last - addr);
        // The offset lies inside a mapping of this process, so it fits.
        #[allow(clippy::cast_possible_truncation)]
        let host = region.host() + (offset - before) as usize;
        let (start, size, permissions) = (addr - before, before + after + 1, range.permissions);
        Ok(RegionCache {
            table: u64::MAX,
            start,
            size,
            host,
            translated: self.table,
            permissions,
            removals,
            refused: None,
        })
    }

    /// The front-end-virtual range `addr .. addr + len` as a span, if it lies inside one region.
    pub fn translate_user(&self, addr: u64, len: u32) -> Option<Span> {
        self.regions.iter().find_map(|region| {
            let offset = region.spec.offset_of(AddressSpace::User, addr)?;
            if u64::from(len) > region.spec.size - offset {
                return None;
            }
            span(region.host(), offset, len)
        })
    }

    #[cold]
    fn find(&self, addr: u64) -> Option<RegionCache> {
        if self.iotlb.is_some() {
            return None;
        }
        let above = self.regions.partition_point(|region| region.spec.guest_addr <= addr);
        let region = self.regions.get(above.checked_sub(1)?)?;
        region.spec.offset_of(AddressSpace::Guest, addr)?;
        let RegionSpec { guest_addr: start, size, .. } = region.spec;
        Some(RegionCache { table: self.table, start, size, host: region.host(), ..RegionCache::default() })
    }
}

impl Logged {
    #[cold]
    fn guest_addr(&self, place: *const u8) -> Option<u64> {
        let place = place.addr();
        let above = self.places.partition_point(|(host, ..)| *host <= place);
        let (host, size, guest) = *self.places.get(above.checked_sub(1)?)?;
        let offset = (place - host) as u64;
        (offset < size).then(|| guest + offset)
    }
}

#[inline]
fn span(host: usize, offset: u64, len: u32) -> Option<Span> {
    Some(Span::new(NonNull::new(place(host, offset))?, len))
}

#[inline(always)]
fn place(host: usize, offset: u64) -> *mut u8 {
    // The offset lies inside a mapping of this process, so it fits.
    #[allow(clippy::cast_possible_truncation)]
    std::ptr::with_exposed_provenance_mut(host + offset as usize)
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.regions.iter().map(|region| {
                let fault = if region.mapping.faulted() { ", faulted" } else { "" };
                format!("{} at {:#x}{fault}", region.spec, region.host())
            }))
            .finish()
    }
}
