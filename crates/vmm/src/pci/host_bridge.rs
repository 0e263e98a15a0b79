//! The function at 00:00.0 that stands for the root itself: guests look for it to believe in the bus.

use std::sync::Arc;

use super::{Description, Identity, PciFunction, Pins};

/// A host bridge without registers: vendor and device are those that are assigned to a generic one (pci.ids: 1b36:0008).
pub struct HostBridge;

impl PciFunction for HostBridge {
    fn name(&self) -> &str {
        "host-bridge"
    }

    fn describe(&self) -> Description {
        Description {
            identity: Identity {
                vendor: 0x1B36,
                device: 0x0008,
                revision: 0,
                class: 0x06_00_00,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
            bars: [None; 6],
            capabilities: Vec::new(),
            msix: None,
            pin: false,
        }
    }

    fn attached(&self, _pins: &Arc<Pins>) {}

    fn read_bar(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn write_bar(&self, _bar: usize, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {}
}
