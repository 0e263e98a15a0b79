//! A queue in memory of its own, with a driver and a device on it.
#![allow(dead_code)]

use viaduct_memory::{GuestMemory, RegionCache, Span};
use viaduct_ring::{DeviceQueue, DriverQueue, Layout, PACKED_START, QueueConfig, RingLayout};

/// Where the buffers of a [`Rig`] begin.
pub const DATA: u64 = 4 << 20;
/// Bytes for buffers.
pub const DATA_LEN: u64 = 8 << 20;
/// Where the indirect tables lie.
pub const TABLES: u64 = DATA + DATA_LEN;
/// Bytes for indirect tables.
pub const TABLES_LEN: u32 = 4 << 20;

/// A configuration for `size` descriptors, with the parts from address 0 on.
pub fn config(layout: Layout, size: u32) -> QueueConfig {
    let (descriptor_addr, driver_addr, device_addr, _) = RingLayout::new(layout, size, true).unwrap().place(0);
    QueueConfig {
        layout,
        size,
        descriptor_addr,
        driver_addr,
        device_addr,
        base: if layout == Layout::Packed { PACKED_START } else { 0 },
        event_idx: false,
        indirect: false,
        in_order: false,
    }
}

/// Memory for a queue, buffers and indirect tables, at the same address in both spaces.
pub fn memory() -> GuestMemory {
    GuestMemory::allocate(TABLES + u64::from(TABLES_LEN)).unwrap()
}

pub struct Rig {
    pub memory: GuestMemory,
    pub driver: DriverQueue,
    pub device: DeviceQueue,
}

impl Rig {
    pub fn new(config: &QueueConfig) -> Rig {
        let memory = memory();
        let mut driver = DriverQueue::new(memory.clone(), config).unwrap();
        if config.indirect {
            driver.set_indirect_area(TABLES, TABLES_LEN).unwrap();
        }
        let device = DeviceQueue::new(memory.clone(), config).unwrap();
        Rig { memory, driver, device }
    }

    pub fn span(&self, addr: u64, len: u32) -> Span {
        self.memory.translate(&mut RegionCache::default(), addr, len).unwrap()
    }

    pub fn read(&self, addr: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        // SAFETY: the span was just found in memory that the rig keeps.
        unsafe { self.span(addr, len).read(0, &mut bytes) };
        bytes
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        // SAFETY: the span was just found in memory that the rig keeps.
        unsafe { self.span(addr, bytes.len() as u32).write(0, bytes) };
    }

    pub fn put<const N: usize>(&self, addr: u64, value: [u8; N]) {
        self.write(addr, &value);
    }

    pub fn get_u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.read(addr, 2).try_into().unwrap())
    }

    /// Writes a split descriptor into the table at `table`.
    pub fn split_descriptor(&self, table: u64, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * index;
        self.put(at, addr.to_le_bytes());
        self.put(at + 8, len.to_le_bytes());
        self.put(at + 12, flags.to_le_bytes());
        self.put(at + 14, next.to_le_bytes());
    }

    /// Writes a packed descriptor into the ring or table at `ring`.
    pub fn packed_descriptor(&self, ring: u64, index: u64, addr: u64, len: u32, id: u16, flags: u16) {
        let at = ring + 16 * index;
        self.put(at, addr.to_le_bytes());
        self.put(at + 8, len.to_le_bytes());
        self.put(at + 12, id.to_le_bytes());
        self.put(at + 14, flags.to_le_bytes());
    }
}
