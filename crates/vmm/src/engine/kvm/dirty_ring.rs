//! The ring in which a vCPU tells which pages it has written.
//!
//! # Theory of operation
//!
//! Each vCPU has a ring of its own, mapped behind its shared page. KVM fills entries in order and marks each as dirty; we
//! take them in the same order, mark each as taken, and ask KVM to reset all that are: from then on those pages are watched
//! again (Linux Documentation/virt/kvm/api.rst, 8.29). A vCPU whose ring is full leaves the guest until that has been done.
//! In contrast to the log of a slot, taking costs what was written, and not what there is.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, addr_of_mut};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_GFN_F_MASK, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};

const PAGE: usize = 4096;
/// An entry that KVM has filled (KVM_DIRTY_GFN_F_DIRTY), and one that has been taken (KVM_DIRTY_GFN_F_RESET).
const DIRTY: u32 = 1 << 0;
const TAKEN: u32 = 1 << 1;

/// One vCPU's ring.
pub(super) struct DirtyRing {
    entries: NonNull<kvm_dirty_gfn>,
    count: usize,
    next: usize,
}

// SAFETY: the mapping is used only through `&mut self`, and with KVM as its protocol says.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Bytes of a ring of `entries`.
    pub(super) fn bytes(entries: u32) -> usize {
        entries as usize * size_of::<kvm_dirty_gfn>()
    }

    /// Entries that a ring of `bytes` has.
    pub(super) fn entries(bytes: usize) -> usize {
        bytes / size_of::<kvm_dirty_gfn>()
    }

    /// Maps the ring of `vcpu`, which has as many entries as the machine's were made with.
    pub(super) fn map(vcpu: &impl AsRawFd, entries: u32) -> io::Result<DirtyRing> {
        let offset = (KVM_DIRTY_LOG_PAGE_OFFSET as usize * PAGE) as libc::off_t;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a descriptor that KVM lets be mapped there; nothing else is at the address we get.
        let ring = unsafe {
            let fd = vcpu.as_raw_fd();
            libc::mmap(std::ptr::null_mut(), DirtyRing::bytes(entries), protection, libc::MAP_SHARED, fd, offset)
        };
        if ring == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries_at = NonNull::new(ring.cast()).ok_or(io::ErrorKind::AddrInUse)?;
        Ok(DirtyRing { entries: entries_at, count: entries as usize, next: 0 })
    }

    /// Takes all entries that are there: slot, and page in it.
    pub(super) fn take(&mut self, mut each: impl FnMut(u32, u64)) {
        // A vCPU that runs meanwhile may go on filling: one round is enough.
        for _ in 0..self.count {
            // SAFETY: inside the mapping. KVM writes an entry's other members before it marks it, and nothing after.
            let (flags, entry) = unsafe {
                let entry = self.entries.as_ptr().add(self.next);
                (AtomicU32::from_ptr(addr_of_mut!((*entry).flags)), entry)
            };
            if flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK != DIRTY {
                break;
            }
            // SAFETY: as above.
            let (slot, page) =
                unsafe { (addr_of_mut!((*entry).slot).read_volatile(), addr_of_mut!((*entry).offset).read_volatile()) };
            each(slot, page);
            flags.store(TAKEN, Ordering::Release);
            self.next = (self.next + 1) % self.count;
        }
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: our mapping, of that size, and no pointer into it outlives `self`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.count * size_of::<kvm_dirty_gfn>()) };
    }
}
