//! Configuration space by ports: an address at 0xCF8, data at 0xCFC (PCI 3.0, 3.2.2.3.2).

use std::sync::Arc;

use super::PciRoot;
use crate::bus::BusDevice;

/// Ports from [`ConfigPorts::BASE`] on.
const ADDRESS: u64 = 0;
/// Chipsets have the reset control register inside the address register; only accesses of one byte reach it.
const RESET_CONTROL: u64 = 1;
const DATA: u64 = 4;
/// The address register's bit that lets accesses to the data through.
const ENABLE: u32 = 1 << 31;

/// The eight ports.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    reset_control: Option<Arc<dyn BusDevice>>,
}

impl ConfigPorts {
    /// Their first one.
    pub const BASE: u64 = 0xCF8;
    /// How many there are.
    pub const SIZE: u64 = 8;

    /// Ports for `root`; what is written to 0xCF9 as a byte is `reset_control`'s.
    pub fn new(root: Arc<PciRoot>, reset_control: Option<Arc<dyn BusDevice>>) -> ConfigPorts {
        ConfigPorts { root, reset_control }
    }

    /// Bus, slot and function, and the offset in configuration space, if the address register names one.
    fn target(&self, offset: u64) -> Option<(u32, usize)> {
        let address = self.root.config_address();
        let register = (address & 0xFC) as usize + offset.checked_sub(DATA)? as usize;
        (address & ENABLE != 0).then_some((address >> 8 & 0xFFFF, register))
    }
}

impl BusDevice for ConfigPorts {
    fn name(&self) -> &str {
        "pci-config-ports"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((function, register)) = self.target(offset) {
            return self.root.read_config(function, register, data);
        }
        data.fill(0xFF);
        match (offset, data.len(), &self.reset_control) {
            (ADDRESS, 4, _) => data.copy_from_slice(&self.root.config_address().to_le_bytes()),
            (RESET_CONTROL, 1, Some(device)) => device.read(0, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.target(offset) {
            return self.root.write_config(function, register, data);
        }
        match (offset, data, &self.reset_control) {
            (ADDRESS, &[a, b, c, d], _) => self.root.set_config_address(u32::from_le_bytes([a, b, c, d])),
            (RESET_CONTROL, [_], Some(device)) => device.write(0, data),
            _ => {}
        }
    }
}
