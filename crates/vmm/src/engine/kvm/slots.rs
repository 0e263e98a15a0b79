//! Memory slots: which of the guest's physical addresses are which of ours.
//!
//! A slot is a region of [`GuestMemory`] under a number. Regions come and go while the guest runs (a hot-plugged DIMM, a
//! window of a device), and a new memory is most often the old one with one region more or less: slots of regions that
//! stay are left alone, because changing one makes KVM forget its translations.

use std::collections::BTreeMap;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use viaduct_memory::{GuestMemory, RegionCache, RegionSpec};

use crate::engine::{DirtyPages, EngineError};

const PAGE: u64 = 4096;

/// One region that KVM knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    number: u32,
    guest: u64,
    size: u64,
    host: u64,
}

impl Slot {
    fn region(&self, flags: u32) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot: self.number,
            flags,
            guest_phys_addr: self.guest,
            memory_size: self.size,
            userspace_addr: self.host,
        }
    }
}

/// All slots, and the memory that they show to the guest: it stays mapped as long as this is there.
pub(super) struct Slots {
    max: usize,
    slots: Vec<Slot>,
    memory: GuestMemory,
    /// What rings have told of pages written, by number of the slot; `None`: nothing is noted.
    dirty: Option<BTreeMap<u32, Vec<u64>>>,
}

impl Slots {
    pub(super) fn new(max: usize) -> Slots {
        Slots { max, slots: Vec::new(), memory: GuestMemory::new(), dirty: None }
    }

    /// Makes KVM's slots those of `memory`.
    pub(super) fn set(&mut self, fd: &VmFd, memory: &GuestMemory) -> Result<(), EngineError> {
        let wanted = memory.regions().map(|region| place(memory, region)).collect::<Result<Vec<_>, _>>()?;
        if wanted.is_empty() {
            return Err(EngineError::Invalid("a machine needs memory: there is no region".into()));
        }
        if wanted.len() > self.max {
            let (found, max) = (wanted.len(), self.max);
            return Err(EngineError::Invalid(format!("{found} regions of memory: this KVM allows {max}")));
        }
        let (stay, go): (Vec<Slot>, Vec<Slot>) =
            self.slots.iter().partition(|slot| wanted.contains(&(slot.guest, slot.size, slot.host)));
        for slot in &go {
            apply(fd, &Slot { size: 0, ..*slot }, 0)?;
            if let Some(dirty) = &mut self.dirty {
                // Its number may be another region's soon.
                dirty.remove(&slot.number);
            }
        }
        self.slots = stay;
        let flags = self.flags();
        for (guest, size, host) in wanted {
            if self.slots.iter().any(|slot| (slot.guest, slot.size, slot.host) == (guest, size, host)) {
                continue;
            }
            let number = (0..).find(|number| self.slots.iter().all(|slot| slot.number != *number)).unwrap_or(u32::MAX);
            let slot = Slot { number, guest, size, host };
            if let Err(error) = apply(fd, &slot, flags) {
                self.restore(fd, &go);
                return Err(error);
            }
            self.slots.push(slot);
        }
        self.memory = memory.clone();
        Ok(())
    }

    fn flags(&self) -> u32 {
        if self.dirty.is_some() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }
    }

    /// Notes pages that are written, or no longer.
    pub(super) fn log_dirty(&mut self, fd: &VmFd, on: bool) -> Result<(), EngineError> {
        if self.dirty.is_some() == on {
            return Ok(());
        }
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        self.slots.iter().try_for_each(|slot| apply(fd, slot, flags))?;
        self.dirty = on.then(BTreeMap::new);
        Ok(())
    }

    /// A ring has told that a page was written. What lies in no slot is of one that has gone.
    pub(super) fn note_dirty(&mut self, slot: u32, page: u64) {
        let Some(known) = self.slots.iter().find(|known| known.number == slot) else { return };
        let (Some(dirty), pages) = (&mut self.dirty, known.size / PAGE) else { return };
        if page < pages {
            let bitmap = dirty.entry(slot).or_insert_with(|| vec![0; pages.div_ceil(64) as usize]);
            bitmap[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// A ring may have lost some: any page may have been written.
    pub(super) fn note_all_dirty(&mut self) {
        let Some(dirty) = &mut self.dirty else { return };
        for slot in &self.slots {
            let pages = slot.size / PAGE;
            let mut bitmap = vec![u64::MAX; pages.div_ceil(64) as usize];
            if let Some(last) = bitmap.last_mut().filter(|_| !pages.is_multiple_of(64)) {
                *last = (1 << (pages % 64)) - 1;
            }
            dirty.insert(slot.number, bitmap);
        }
    }

    /// The pages that were noted, by region; `rings`: rings have told them, and else KVM has bitmaps.
    pub(super) fn take_dirty(&mut self, fd: &VmFd, rings: bool) -> Result<Vec<DirtyPages>, EngineError> {
        let Some(dirty) = &mut self.dirty else {
            return Err(EngineError::Invalid("nobody has asked for written pages to be noted".into()));
        };
        let take = |slot: &Slot| {
            let bitmap = if rings {
                dirty.remove(&slot.number).unwrap_or_else(|| vec![0; (slot.size / PAGE).div_ceil(64) as usize])
            } else {
                let number = slot.number;
                fd.get_dirty_log(number, slot.size as usize)
                    .map_err(|error| EngineError::system(format!("KVM_GET_DIRTY_LOG of slot {number}"), error))?
            };
            Ok(DirtyPages { base: slot.guest, bitmap })
        };
        self.slots.iter().map(take).collect()
    }

    /// The memory that the guest has.
    pub(super) fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    /// Fills `data` from guest-physical memory; false if some of it is not there.
    pub(super) fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        let span = self.memory.translate(&mut RegionCache::default(), addr, data.len() as u32);
        // SAFETY: `self.memory` keeps it alive, and the span is as long as `data`.
        span.map(|span| unsafe { span.read(0, data) }).is_some()
    }

    /// Writes `data` to guest-physical memory; false if some of it would not be there.
    pub(super) fn write(&self, addr: u64, data: &[u8]) -> bool {
        let span = self.memory.translate(&mut RegionCache::default(), addr, data.len() as u32);
        let written = span.map(|span| {
            // SAFETY: `self.memory` keeps it alive, and the span is as long as `data`.
            unsafe { span.write(0, data) };
            self.memory.mark_written(span, span.len());
        });
        written.is_some()
    }

    /// Puts the slots back that were there before a change that failed. The old memory is still mapped.
    fn restore(&mut self, fd: &VmFd, gone: &[Slot]) {
        let old = |slot: &Slot| {
            let mut cache = RegionCache::default();
            let span = self.memory.translate(&mut cache, slot.guest, 1);
            span.is_some_and(|span| span.as_ptr() as u64 == slot.host)
        };
        let (stay, new): (Vec<Slot>, Vec<Slot>) = self.slots.iter().copied().partition(old);
        for slot in new {
            // What KVM has just taken it also gives back.
            let _ = apply(fd, &Slot { size: 0, ..slot }, 0);
        }
        self.slots = stay;
        for slot in gone {
            if apply(fd, slot, self.flags()).is_ok() {
                self.slots.push(*slot);
            }
        }
    }
}

/// Guest address, size and address in this process of a region, as KVM can take it.
fn place(memory: &GuestMemory, region: &RegionSpec) -> Result<(u64, u64, u64), EngineError> {
    let RegionSpec { guest_addr, size, .. } = *region;
    if guest_addr % PAGE != 0 || size % PAGE != 0 {
        return Err(EngineError::Invalid(format!(
            "{size:#x} bytes of memory at guest address {guest_addr:#x}: both must be multiples of {PAGE:#x}"
        )));
    }
    let span = memory.translate(&mut RegionCache::default(), guest_addr, 1);
    let host = span.map(|span| span.as_ptr() as u64).filter(|host| host % PAGE == 0);
    let host = host.ok_or_else(|| {
        EngineError::Invalid(format!("the memory at guest address {guest_addr:#x} is not at a whole page of its file"))
    })?;
    Ok((guest_addr, size, host))
}

fn apply(fd: &VmFd, slot: &Slot, flags: u32) -> Result<(), EngineError> {
    let region = slot.region(flags);
    // SAFETY: the region is one of the mappings of `Slots::memory`, or about to be, which outlives the slot.
    unsafe { fd.set_user_memory_region(region) }.map_err(|error| {
        let Slot { number, guest, size, .. } = slot;
        EngineError::system(
            format!("KVM_SET_USER_MEMORY_REGION of slot {number}, {size:#x} bytes at guest address {guest:#x}"),
            error,
        )
    })
}
