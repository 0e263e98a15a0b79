//! Where the accesses of a guest that find no memory are answered: one bus for ports, one for addresses.
//!
//! # Theory of operation
//!
//! A bus is a list of ranges, ordered by their first address, none overlapping another; a device may own several. An access
//! is found by halves in a snapshot of that list, so vCPUs never wait for each other here, and a device may change the bus
//! while it handles an access (a PCI function whose base address register was written). What begins in a range and ends
//! behind it, and what is in no range at all, is nobody's: the hardware's answer to that is all ones, and a write is lost.
//!
//! The bus knows where every device is, so it is the one that tells the engine where writes may be posted, for as long as
//! the device is there.

use std::fmt;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::engine::{Attachment, Posting, Space, Vm};

/// A device as the guest's processor sees it: registers. Called by any vCPU's thread at any time, so locks are inside.
///
/// Offset, length and data are the guest's choice: an access that makes no sense for the device is answered as hardware
/// answers it, and never a reason to panic, to wait, or to loop.
pub trait BusDevice: Send + Sync {
    /// What traces and errors call it: `serial`, `virtio-blk 0`.
    fn name(&self) -> &str;
    /// Fills `data`, 1 to 8 bytes, from the register at `offset` from the range's first address.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`, 1 to 8 bytes, into the register at `offset`.
    fn write(&self, offset: u64, data: &[u8]);

    /// Offsets whose writes need not arrive before the guest's next access that needs an answer, nor wake anybody: what such
    /// a write changes nobody can see who has not come through this device's other registers. It then costs no exit.
    fn posted(&self) -> &[Range] {
        &[]
    }
}

/// A range of ports or addresses: `base` up to and including `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Its first address.
    pub base: u64,
    /// Its last address.
    pub last: u64,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.base, self.last)
    }
}

/// Why a bus refused a range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// It has no addresses, or goes beyond the last one of the bus.
    #[error("{device}: {size:#x} bytes from {base:#x} are not inside the bus, which ends at {last:#x}")]
    Outside {
        /// Whose range it would be.
        device: String,
        /// The first address asked for.
        base: u64,
        /// The number of addresses asked for.
        size: u64,
        /// The last address of the bus.
        last: u64,
    },
    /// Something is there already.
    #[error("{device} at {range} overlaps {other} at {other_range}; give one of them another place")]
    Overlap {
        /// Whose range it would be.
        device: String,
        /// The range asked for.
        range: Range,
        /// Who is there.
        other: String,
        /// The range of that one.
        other_range: Range,
    },
    /// There is nothing to remove.
    #[error("no range of the bus begins at {0:#x}")]
    Nobody(u64),
}

#[derive(Clone)]
struct Slot {
    range: Range,
    device: Arc<dyn BusDevice>,
    /// Where the engine posts this device's writes.
    posted: Arc<Mutex<Vec<Box<dyn Attachment>>>>,
}

/// One address space of devices.
pub struct Bus {
    last: u64,
    slots: RwLock<Arc<[Slot]>>,
    /// Who is told where writes may be posted.
    posts: Option<(Arc<dyn Vm>, Space)>,
}

/// The device that answers an access, and where in its range the access is.
pub struct Target {
    /// The device.
    pub device: Arc<dyn BusDevice>,
    /// Distance from the first address of its range.
    pub offset: u64,
}

impl Bus {
    /// The x86 port space: 65536 ports.
    pub fn ports() -> Bus {
        Bus { last: 0xFFFF, slots: RwLock::new(Arc::new([])), posts: None }
    }

    /// The physical address space.
    pub fn addresses() -> Bus {
        Bus { last: u64::MAX, slots: RwLock::new(Arc::new([])), posts: None }
    }

    /// This bus, with an engine that may post writes to its devices.
    #[must_use]
    pub fn posting(mut self, vm: Arc<dyn Vm>, space: Space) -> Bus {
        self.posts = Some((vm, space));
        self
    }

    /// What the engine posts of `device` at `base`. If it cannot, each write is an exit.
    fn post(&self, base: u64, device: &dyn BusDevice) -> Vec<Box<dyn Attachment>> {
        let Some((vm, space)) = &self.posts else { return Vec::new() };
        let at = |offsets: &Range| {
            let range = Range { base: base.checked_add(offsets.base)?, last: base.checked_add(offsets.last)? };
            vm.post_writes(Posting { space: *space, range }).ok()
        };
        device.posted().iter().filter_map(at).collect()
    }

    /// Puts `device` at `size` addresses from `base` on.
    ///
    /// # Errors
    /// [`BusError::Outside`], [`BusError::Overlap`]: nothing has changed.
    pub fn insert(&self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let name = || device.name().to_owned();
        let last = size.checked_sub(1).and_then(|more| base.checked_add(more)).filter(|&last| last <= self.last);
        let Some(last) = last else {
            return Err(BusError::Outside { device: name(), base, size, last: self.last });
        };
        let range = Range { base, last };
        let mut slots = self.slots.write();
        let at = slots.partition_point(|slot| slot.range.last < base);
        if let Some(other) = slots.get(at).filter(|slot| slot.range.base <= last) {
            let (other, other_range) = (other.device.name().to_owned(), other.range);
            return Err(BusError::Overlap { device: name(), range, other, other_range });
        }
        let posted = Arc::new(Mutex::new(self.post(base, &*device)));
        let (below, above) = slots.split_at(at);
        *slots = below.iter().cloned().chain([Slot { range, device, posted }]).chain(above.iter().cloned()).collect();
        Ok(())
    }

    /// Takes away the range that begins at `base`. A vCPU that found the device just before may still finish its access.
    ///
    /// # Errors
    /// [`BusError::Nobody`].
    pub fn remove(&self, base: u64) -> Result<(), BusError> {
        let mut slots = self.slots.write();
        let at = slots.binary_search_by_key(&base, |slot| slot.range.base).map_err(|_| BusError::Nobody(base))?;
        // Now, and not when the last vCPU has done with the old list: somebody else may be at this address next.
        slots[at].posted.lock().clear();
        let (below, above) = slots.split_at(at);
        *slots = below.iter().chain(&above[1..]).cloned().collect();
        Ok(())
    }

    /// Who answers an access of `len` bytes at `addr`, if its whole range is one device's.
    pub fn find(&self, addr: u64, len: usize) -> Option<Target> {
        let slots = self.slots.read().clone();
        let at = slots.partition_point(|slot| slot.range.last < addr);
        let slot = slots.get(at).filter(|slot| slot.range.base <= addr)?;
        let behind = (slot.range.last - addr).saturating_add(1);
        (len as u64 <= behind).then(|| Target { device: slot.device.clone(), offset: addr - slot.range.base })
    }

    /// Answers a read; all ones if nobody does. Returns whether somebody did.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some(target) => target.device.read(target.offset, data),
            None => {
                data.fill(0xFF);
                return false;
            }
        }
        true
    }

    /// Delivers a write. Returns whether somebody took it.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr, data.len()) {
            Some(target) => target.device.write(target.offset, data),
            None => return false,
        }
        true
    }

    /// Every range with the name of its device, in order.
    pub fn ranges(&self) -> Vec<(Range, String)> {
        self.slots.read().iter().map(|slot| (slot.range, slot.device.name().to_owned())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    struct Registers(&'static str, Mutex<[u8; 16]>);

    impl BusDevice for Registers {
        fn name(&self) -> &str {
            self.0
        }
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.1.lock()[offset as usize..][..data.len()]);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.1.lock()[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn registers(name: &'static str) -> Arc<dyn BusDevice> {
        Arc::new(Registers(name, Mutex::new([0; 16])))
    }

    #[test]
    fn an_access_reaches_the_device_at_its_address() {
        let bus = Bus::addresses();
        bus.insert(0x1000, 16, registers("a")).unwrap();
        bus.insert(0x1010, 16, registers("b")).unwrap();
        assert!(bus.write(0x1014, &[1, 2]));
        let mut data = [0; 4];
        assert!(bus.read(0x1013, &mut data));
        assert_eq!(data, [0, 1, 2, 0]);
        assert!(bus.read(0x1003, &mut data));
        assert_eq!(data, [0; 4], "its neighbour has registers of its own");
    }

    #[test]
    fn what_nobody_answers_reads_as_ones() {
        let bus = Bus::ports();
        bus.insert(0x3F8, 8, registers("serial")).unwrap();
        for addr in [0x3F7, 0x400, 0x3FD] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xFF; 4]);
            assert!(!bus.write(addr, &data));
        }
    }

    #[test]
    fn ranges_that_overlap_are_refused_by_name() {
        let bus = Bus::ports();
        bus.insert(0x100, 0x10, registers("first")).unwrap();
        for (base, size) in [(0x100, 1), (0xFF, 2), (0x10F, 1), (0x80, 0x200), (0x104, 4)] {
            let error = bus.insert(base, size, registers("second")).unwrap_err();
            assert!(matches!(&error, BusError::Overlap { other, .. } if other == "first"), "{error}");
        }
        bus.insert(0x110, 1, registers("behind")).unwrap();
        bus.insert(0xFF, 1, registers("before")).unwrap();
        let names: Vec<_> = bus.ranges().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["before", "first", "behind"]);
    }

    #[test]
    fn a_range_lies_inside_its_bus() {
        let bus = Bus::ports();
        for (base, size) in [(0, 0), (0xFFFF, 2), (0x1_0000, 1), (u64::MAX, 2)] {
            assert!(matches!(bus.insert(base, size, registers("x")), Err(BusError::Outside { .. })));
        }
        Bus::addresses().insert(0, u64::MAX, registers("everything")).unwrap();
        let bus = Bus::addresses();
        bus.insert(u64::MAX - 3, 4, registers("the end")).unwrap();
        assert!(bus.read(u64::MAX, &mut [0]));
    }

    #[test]
    fn a_removed_range_is_free() {
        let bus = Bus::addresses();
        bus.insert(0x1000, 16, registers("a")).unwrap();
        assert_eq!(bus.remove(0x1001), Err(BusError::Nobody(0x1001)));
        bus.remove(0x1000).unwrap();
        assert!(!bus.read(0x1000, &mut [0]));
        bus.insert(0x1008, 16, registers("b")).unwrap();
    }
}
