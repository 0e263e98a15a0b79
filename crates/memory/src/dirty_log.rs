//! Which pages of a guest the device has written: the log of a live migration (vhost-user, "Migration").
//!
//! # Theory of operation
//!
//! While a guest moves to another host its memory is copied under it, page by page, and whatever is written after a page
//! was copied has to be copied again. Its processors' writes are seen by the hypervisor; ours are not, so we tell: one
//! bit for each page of [`PAGE`](DirtyLog::PAGE) bytes of guest-physical memory, from address 0 on, in a file that the
//! front-end shares. Bit `n % 8` of byte `n / 8` is page `n`; on a little-endian host that is what QEMU reads as words.
//!
//! # Order
//!
//! The front-end takes the bits (it reads and clears a word in one atomic step) and then copies the pages. We write and
//! then mark, with release, so that there are two cases: the bit was taken, and then what we wrote is there to be copied;
//! or it was not, and it will be taken the next time. Were the mark first, the bit could be taken and the page copied
//! before the write. The last time is after GET_VRING_BASE, which is answered when the queue has stopped at the end of a
//! batch: nothing is written or marked after that. For the same reason a mark may come later than the notice to the
//! driver, as long as it comes in the same batch.
//!
//! The test "is it marked already?" is left out on purpose: without a full fence between the write and that test the bit
//! could be seen set, taken, and the page copied while the write is still on its way.
//!
//! # Hostile front-ends
//!
//! Where a bit lies is computed from addresses that the front-end names. A bit beyond the end of the log is not written.
//! The file may be cut like any other, and is guarded in the same way ([`crate::fault`]).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::{Call, Mapping, MappingError};

/// A log of written pages, shared with the front-end. Cloning shares it.
#[derive(Clone, Debug)]
pub struct DirtyLog {
    mapping: Arc<Mapping>,
    event: Option<Arc<Call>>,
}

impl DirtyLog {
    /// Bytes of guest memory that one bit stands for, whatever the size of the host's pages.
    pub const PAGE: u64 = 4096;

    /// The log that lies in `size` bytes of `file` from `offset` (vhost-user, "Log description").
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn new(file: BorrowedFd<'_>, offset: u64, size: u64) -> Result<DirtyLog, MappingError> {
        Ok(DirtyLog { mapping: Arc::new(Mapping::new(file, offset, size)?), event: None })
    }

    /// The same log, of which `event`, an eventfd, is told when pages have been marked (vhost-user,
    /// VHOST_USER_SET_LOG_FD).
    pub fn with_event(&self, event: Call) -> DirtyLog {
        DirtyLog { mapping: self.mapping.clone(), event: Some(Arc::new(event)) }
    }

    /// The first address that has no bit. It may be more than there are addresses.
    pub fn end(&self) -> u128 {
        self.mapping.len() as u128 * 8 * u128::from(DirtyLog::PAGE)
    }

    /// Whether every page of `len` bytes from `addr` has a bit.
    pub fn covers(&self, addr: u64, len: u64) -> bool {
        u128::from(addr) + u128::from(len) <= self.end()
    }

    /// Whether the file was cut: the marks go nowhere since then.
    #[inline]
    pub fn faulted(&self) -> bool {
        self.mapping.faulted()
    }

    /// Marks the pages of `len` bytes from `addr`, which were written before. Pages that have no bit are left out: whoever
    /// attaches the log to a memory is told whether it [`covers`](DirtyLog::covers) what will be marked.
    #[cold]
    pub fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|more| addr.saturating_add(more) / DirtyLog::PAGE) else { return };
        let first = addr / DirtyLog::PAGE;
        let mut news = false;
        for index in first / 8..=last / 8 {
            let Some(byte) = usize::try_from(index).ok().filter(|index| *index < self.mapping.len()) else { break };
            // Of the byte's eight pages those from `first` to `last`.
            let from = first.saturating_sub(8 * index);
            let to = (last - 8 * index).min(7);
            let bits = (0xffu8 << from) & (0xff >> (7 - to));
            // SAFETY: the index is within the mapping, which lives as long as this, and bytes are always aligned.
            let byte = unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(byte)) };
            if self.event.is_none() {
                // Without a look at what was there, which on x86-64 is one instruction.
                byte.fetch_or(bits, Ordering::Release);
            } else {
                news |= byte.fetch_or(bits, Ordering::Release) & bits != bits;
            }
        }
        if news {
            self.tell();
        }
    }

    /// An eventfd that is full says already what there is to say.
    fn tell(&self) {
        if let Some(event) = &self.event {
            event.signal();
        }
    }
}
