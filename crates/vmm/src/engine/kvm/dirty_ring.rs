//! The ring in which a vCPU tells which pages it has written.
//!
//! # Theory of operation
//!
//! Each vCPU has a ring of its own, mapped behind its shared page. KVM fills entries in order and marks each as dirty; we
//! take them in the same order, mark each as taken, and ask KVM to reset all that are: from then on those pages are watched
//! again (Linux Documentation/virt/kvm/api.rst, 8.29). A vCPU whose ring is full leaves the guest until that has been done.
//! In contrast to the log of a slot, taking costs what was written, and not what there is.
//!
//! # A ring that overflows
//!
//! KVM lets the vCPU leave when fewer than 64 entries are free (KVM_DIRTY_RING_RSVD_ENTRIES, and the processor's own log of
//! written pages besides), and looks whether it must each time before it enters the guest (Linux virt/kvm/dirty_ring.c,
//! `kvm_dirty_ring_check_request`). Where KVM does not enter the guest but emulates its instructions, many of them pass
//! between two looks, and a guest that writes more than 64 new pages in that time makes KVM write over entries that nobody
//! has taken: the first entry found is of a later page than the last one. So a ring without a free entry counts as one that
//! may have lost some, and all of memory as written, now and from then on: KVM goes on writing where it is, and not where it is
//! looked for. If that is far enough, it waits for entries that it has overwritten itself, and never
//! lets the vCPU run again; [`super::vcpu`] ends that.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, addr_of_mut};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_GFN_F_MASK, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};

const PAGE: usize = 4096;
/// An entry that KVM has filled (KVM_DIRTY_GFN_F_DIRTY), and one that has been taken (KVM_DIRTY_GFN_F_RESET).
const DIRTY: u32 = 1 << 0;
const TAKEN: u32 = 1 << 1;

/// What was found in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// How many entries.
    pub(super) entries: usize,
    /// Whether these are certainly all that KVM has written: there was room for another one.
    pub(super) all: bool,
}

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
    pub(super) fn take(&mut self, mut each: impl FnMut(u32, u64)) -> Taken {
        // A vCPU that runs meanwhile may go on filling: one round is enough.
        for entries in 0..self.count {
            // SAFETY: inside the mapping. KVM writes an entry's other members before it marks it, and nothing after.
            let (flags, entry) = unsafe {
                let entry = self.entries.as_ptr().add(self.next);
                (AtomicU32::from_ptr(addr_of_mut!((*entry).flags)), entry)
            };
            if flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK != DIRTY {
                return Taken { entries, all: true };
            }
            // SAFETY: as above.
            let (slot, page) =
                unsafe { (addr_of_mut!((*entry).slot).read_volatile(), addr_of_mut!((*entry).offset).read_volatile()) };
            each(slot, page);
            flags.store(TAKEN, Ordering::Release);
            self.next = (self.next + 1) % self.count;
        }
        Taken { entries: self.count, all: false }
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: our mapping, of that size, and no pointer into it outlives `self`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.count * size_of::<kvm_dirty_gfn>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    const ENTRIES: u32 = 256;

    /// A ring in a file, where KVM has its own in front of it.
    fn ring() -> (File, DirtyRing) {
        let file = viaduct_memory::memfd((KVM_DIRTY_LOG_PAGE_OFFSET as u64 + 1) * PAGE as u64).unwrap();
        let ring = DirtyRing::map(&file, ENTRIES).unwrap();
        (File::from(file), ring)
    }

    /// As KVM does: the page `page` of slot 1.
    fn fill(file: &mut File, index: u64, page: u64) {
        let at = KVM_DIRTY_LOG_PAGE_OFFSET as u64 * PAGE as u64 + index * size_of::<kvm_dirty_gfn>() as u64;
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&[DIRTY.to_le_bytes(), 1u32.to_le_bytes()].concat()).unwrap();
        file.write_all(&page.to_le_bytes()).unwrap();
    }

    #[test]
    fn entries_are_taken_in_order_and_once() {
        let (mut file, mut ring) = ring();
        for index in 0..3 {
            fill(&mut file, index, 7 * index);
        }
        let mut seen = Vec::new();
        assert_eq!(ring.take(|slot, page| seen.push((slot, page))), Taken { entries: 3, all: true });
        assert_eq!(seen, [(1, 0), (1, 7), (1, 14)]);
        assert_eq!(ring.take(|_, _| panic!("taken already")), Taken { entries: 0, all: true });
    }

    #[test]
    fn a_ring_without_room_may_have_lost_some() {
        let (mut file, mut ring) = ring();
        for index in 0..u64::from(ENTRIES) {
            fill(&mut file, index, index);
        }
        assert_eq!(ring.take(|_, _| {}), Taken { entries: ENTRIES as usize, all: false });
    }
}
