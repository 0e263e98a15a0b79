//! A virtqueue's part behind an IOMMU, in one piece.
//!
//! A ring is contiguous in I/O virtual addresses and is walked as one piece of memory; the pages behind them may lie anywhere
//! in the front-end (Linux makes rings of the pages it gets). Where they do not lie together, they are mapped a second
//! time, one behind the other. The descriptors of the files have been closed by then, so the pages are named by where they
//! are mapped already: `mremap` of length 0 maps a shared range once more (mremap(2)).

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::fault::Registration;
use crate::iotlb::{Access, Iotlb, PAGE, Unreachable};
use crate::{GuestMemory, RegionCache, Span};

/// A part of a ring in this process.
#[derive(Clone, Debug)]
pub struct RingPart {
    span: Span,
    /// Where the pages lie together, if they do not do so anyway, and where they come from.
    remapped: Option<(Arc<Remapped>, Arc<[Span]>)>,
}

impl RingPart {
    /// The first byte's address in this process. It stays while this is alive and the memory it was located in.
    pub fn as_ptr(&self) -> *mut u8 {
        self.span.as_ptr()
    }

    /// Where it lies in the memory it was located in: spans that make it up, one after the other.
    pub fn pieces(&self) -> &[Span] {
        self.remapped.as_ref().map_or(std::slice::from_ref(&self.span), |(_, pieces)| pieces)
    }

    /// Whether an access to pages that are mapped once more has faulted: their file was cut. Of others the memory knows.
    pub fn faulted(&self) -> bool {
        let faulted = |remapped: &Remapped| remapped.registration.as_ref().is_some_and(Registration::faulted);
        self.remapped.as_ref().is_some_and(|(remapped, _)| faulted(remapped))
    }

    /// Whether the pages had to be mapped once more.
    pub fn is_mapped_anew(&self) -> bool {
        self.remapped.is_some()
    }
}

impl GuestMemory {
    /// The part of a ring at `addr`, `len` bytes (not 0): a front-end-virtual address inside one region (vhost-user,
    /// SET_VRING_ADDR), or an I/O virtual one behind an IOMMU, where all of `accesses` must be allowed. The translations
    /// that are missing are asked for.
    ///
    /// # Errors
    /// [`Unreachable`]; [`Missing`](Unreachable::Missing) is an error that passes.
    pub fn ring_part(&self, addr: u64, len: u32, accesses: &[Access]) -> Result<RingPart, Unreachable> {
        let Some(iotlb) = self.iotlb() else {
            let span = self.translate_user(addr, len).ok_or(Unreachable::Outside)?;
            return Ok(RingPart { span, remapped: None });
        };
        let mut pieces = Vec::new();
        for &access in accesses {
            pieces = self.pieces(iotlb, addr, len, access)?;
        }
        let first = *pieces.first().ok_or(Unreachable::Outside)?;
        let end = |span: &Span| span.as_ptr().wrapping_add(span.len() as usize);
        if pieces.windows(2).all(|pair| end(&pair[0]) == pair[1].as_ptr()) {
            return Ok(RingPart { span: Span::new(first.start(), len), remapped: None });
        }
        let remapped = Arc::new(Remapped::new(&pieces).map_err(|_| Unreachable::Outside)?);
        let start = remapped.pages.wrapping_add(first.as_ptr() as usize % PAGE as usize);
        let span = Span::new(NonNull::new(start).ok_or(Unreachable::Outside)?, len);
        Ok(RingPart { span, remapped: Some((remapped, pieces.into())) })
    }

    /// The spans of a range behind an IOMMU. Asks for all translations that are missing.
    fn pieces(&self, iotlb: &Iotlb, addr: u64, len: u32, access: Access) -> Result<Vec<Span>, Unreachable> {
        let (mut pieces, mut cache, mut done) = (Vec::new(), RegionCache::default(), 0);
        let mut missing = None;
        while done < len {
            let at = addr.checked_add(done.into()).ok_or(Unreachable::Outside)?;
            match self.reach(&mut cache, at, len - done, access) {
                Ok(span) => {
                    pieces.push(span);
                    done += span.len();
                }
                Err(Unreachable::Missing(miss)) if iotlb.is_refused(miss) => return Err(Unreachable::Refused),
                Err(Unreachable::Missing(miss)) => {
                    iotlb.request(miss);
                    missing.get_or_insert(miss);
                    done = done.saturating_add((PAGE - at % PAGE) as u32);
                }
                Err(other) => return Err(other),
            }
        }
        missing.map_or(Ok(pieces), |miss| Err(Unreachable::Missing(miss)))
    }
}

/// Pages of shared mappings, mapped once more in another order.
#[derive(Debug)]
struct Remapped {
    pages: *mut u8,
    len: usize,
    /// `None` only while dropping.
    registration: Option<Registration>,
}

// SAFETY: plain shared memory that no thread owns, like the mappings whose pages it shows.
unsafe impl Send for Remapped {}
// SAFETY: as above.
unsafe impl Sync for Remapped {}

impl Remapped {
    /// `pieces` meet at page boundaries; the first may begin and the last end inside a page.
    fn new(pieces: &[Span]) -> io::Result<Remapped> {
        let page = PAGE as usize;
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let mut ranges = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            let (start, end) = (piece.as_ptr() as usize, piece.as_ptr() as usize + piece.len() as usize);
            let (first, last) = (index == 0, index + 1 == pieces.len());
            if !(first || start.is_multiple_of(page)) || !(last || end.is_multiple_of(page)) {
                return Err(invalid());
            }
            let start = start & !(page - 1);
            ranges.push((start, end.next_multiple_of(page) - start));
        }
        let len = ranges.iter().map(|(_, len)| len).sum();
        // SAFETY: a new mapping at a place the kernel chooses touches no memory that exists already.
        let pages = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if pages == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let registration = Some(Registration::new(pages as usize, len));
        let all = Remapped { pages: pages.cast(), len, registration };
        let mut at = all.pages;
        for (start, len) in ranges {
            // SAFETY: the old range is mapped shared, by the memory the pieces come from; the new one is our own.
            let moved = unsafe {
                libc::mremap(
                    std::ptr::with_exposed_provenance_mut(start),
                    0,
                    len,
                    libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                    at,
                )
            };
            if moved == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            at = at.wrapping_add(len);
        }
        Ok(all)
    }
}

impl Drop for Remapped {
    fn drop(&mut self) {
        self.registration = None;
        // SAFETY: the pages are ours, and whoever uses them keeps this alive.
        let done = unsafe { libc::munmap(self.pages.cast(), self.len) };
        debug_assert_eq!(done, 0, "munmap: {}", io::Error::last_os_error());
    }
}
