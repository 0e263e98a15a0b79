//! The ring in which KVM keeps posted writes until somebody takes them (KVM calls them coalesced).
//!
//! # Theory of operation
//!
//! A machine has one ring of a page, whichever vCPU it is mapped by. KVM fills it, under a lock of its own, with the writes
//! of all vCPUs to the zones that were registered, and the vCPUs go on; a write that finds no room is an exit like any other
//! (Linux Documentation/virt/kvm/api.rst, 4.116). Here, whoever has left the guest takes all that is in it before it looks
//! at anything else: so each vCPU's own accesses arrive in the order in which it made them.
//!
//! An entry is given back after it has been delivered. Hence a vCPU that finds the ring empty knows, without the lock, that
//! its own writes have arrived, and one that does not waits until they have.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, addr_of_mut};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use parking_lot::Mutex;

use crate::engine::{PostedWrite, Space};

const PAGE: usize = 4096;
/// Entries of the ring (KVM_COALESCED_MMIO_MAX).
const ENTRIES: u32 = ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The machine's ring.
pub(super) struct CoalescedRing {
    ring: NonNull<kvm_coalesced_mmio_ring>,
    /// Who holds it delivers.
    turn: Mutex<()>,
}

// SAFETY: the two indexes are accessed atomically, and an entry only by who holds `turn`, between KVM's filling it and its
// being given back.
unsafe impl Send for CoalescedRing {}
// SAFETY: as above.
unsafe impl Sync for CoalescedRing {}

impl CoalescedRing {
    /// Maps it by any vCPU of the machine.
    pub(super) fn map(vcpu: &impl AsRawFd) -> io::Result<CoalescedRing> {
        let offset = (KVM_COALESCED_MMIO_PAGE_OFFSET as usize * PAGE) as libc::off_t;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a descriptor that KVM lets be mapped there; nothing else is at the address we get.
        let ring =
            unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), offset) };
        if ring == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ring = NonNull::new(ring.cast()).ok_or(io::ErrorKind::AddrInUse)?;
        Ok(CoalescedRing { ring, turn: Mutex::new(()) })
    }

    /// The next entry to be taken; ours to move.
    fn first(&self) -> &AtomicU32 {
        // SAFETY: mapped while `self` is, and aligned; nobody accesses it otherwise.
        unsafe { AtomicU32::from_ptr(addr_of_mut!((*self.ring.as_ptr()).first)) }
    }

    /// One behind the last entry that is filled; KVM's to move.
    fn last(&self) -> u32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(addr_of_mut!((*self.ring.as_ptr()).last)) }.load(Ordering::Acquire)
    }

    /// Delivers all that is there, and returns when nothing is left of what was there before the call.
    pub(super) fn take(&self, deliver: &mut dyn FnMut(&PostedWrite)) {
        // In this order: `first` passes no entry that has not been delivered, so that the two prove that there is none.
        let last = self.last();
        if self.first().load(Ordering::Acquire) == last {
            return;
        }
        let _turn = self.turn.lock();
        let mut first = self.first().load(Ordering::Relaxed);
        // Other vCPUs may go on filling: once around is all that can have been there.
        for _ in 0..ENTRIES {
            if first == self.last() || first >= ENTRIES {
                break;
            }
            // SAFETY: an entry inside the page, behind the ring's head; KVM filled it before it moved `last`, and leaves it
            // alone until `first` has moved.
            let entry = unsafe {
                let entries = self.ring.as_ptr().add(1).cast::<kvm_coalesced_mmio>();
                entries.add(first as usize).read_volatile()
            };
            // SAFETY: both members of the union are a u32.
            let space = if unsafe { entry.__bindgen_anon_1.pio } != 0 { Space::Ports } else { Space::Addresses };
            deliver(&PostedWrite::new(space, entry.phys_addr, entry.data, entry.len as usize));
            first = (first + 1) % ENTRIES;
            self.first().store(first, Ordering::Release);
        }
    }
}

impl Drop for CoalescedRing {
    fn drop(&mut self) {
        // SAFETY: our mapping, of that size, and no pointer into it outlives `self`.
        unsafe { libc::munmap(self.ring.as_ptr().cast(), PAGE) };
    }
}
