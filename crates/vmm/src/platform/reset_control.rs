//! The reset control register of Intel's south bridges, port 0xCF9 (ICH9 datasheet, 13.7.5): what the FADT of our machines
//! names as their reset register, with the value 6.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Owner, Request};
use crate::bus::BusDevice;

/// SYS_RST: the next reset is a hard one. Every one of ours is.
const SYSTEM: u8 = 1 << 1;
/// RST_CPU: a change from 0 to 1 resets.
const RESET: u8 = 1 << 2;
/// FULL_RST: with a power cycle.
const FULL: u8 = 1 << 3;

/// What a snapshot keeps of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetControlState {
    /// The register.
    pub register: u8,
}

/// The register.
pub struct ResetControl {
    owner: Arc<dyn Owner>,
    state: Mutex<ResetControlState>,
}

impl ResetControl {
    /// Asks `owner` to reset the machine.
    pub fn new(owner: Arc<dyn Owner>) -> ResetControl {
        ResetControl { owner, state: Mutex::default() }
    }

    /// What it has to remember.
    pub fn save(&self) -> ResetControlState {
        *self.state.lock()
    }

    /// Goes on from what another one remembered.
    pub fn restore(&self, state: ResetControlState) {
        self.state.lock().register = state.register & (SYSTEM | FULL);
    }

    /// As after power on.
    pub fn reset(&self) {
        *self.state.lock() = ResetControlState::default();
    }
}

impl BusDevice for ResetControl {
    fn name(&self) -> &str {
        "reset-control"
    }

    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = self.state.lock().register;
    }

    fn write(&self, _: u64, data: &[u8]) {
        // The bit clears itself when the reset has happened, which is at once.
        self.state.lock().register = data[0] & (SYSTEM | FULL);
        if data[0] & RESET != 0 {
            self.owner.request(self.name(), Request::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock::Requests;
    use super::*;

    #[test]
    fn it_resets_as_acpi_and_as_linux_do() {
        let requests = Requests::new();
        let register = ResetControl::new(requests.clone());
        // Linux, `reboot=pci`: the type first, then the same with the bit.
        register.write(0, &[2]);
        assert_eq!(requests.take(), []);
        let mut data = [0];
        register.read(0, &mut data);
        assert_eq!(data, [2]);
        register.write(0, &[6]);
        assert_eq!(requests.take(), [("reset-control".to_owned(), Request::Reset)]);
        register.read(0, &mut data);
        assert_eq!(data, [2], "the bit has cleared itself");
        register.write(0, &[0x0E]);
        assert_eq!(requests.take().len(), 1);
    }
}
