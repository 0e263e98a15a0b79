//! The sleep control and sleep status registers of hardware-reduced ACPI (ACPI 6.4, 4.8.3.7): two ports, by our FADT 0x600
//! and 0x601. The only sleep that a machine of ours knows is to be switched off.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Owner, Request};
use crate::bus::BusDevice;

/// SLP_TYP for S5, "soft off", as the DSDT's `\_S5` has to say it.
pub const S5: u8 = 5;

/// SLP_TYPx: bits 2 to 4 of the control register.
const TYPE_SHIFT: u8 = 2;
const TYPE_MASK: u8 = 7;
/// SLP_EN of the control register; always reads as zero.
const ENABLE: u8 = 1 << 5;
/// WAK_STS of the status register; a one written clears it.
const WAKE: u8 = 1 << 7;

/// What a snapshot keeps of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SleepControlState {
    /// The control register.
    pub control: u8,
    /// The status register.
    pub status: u8,
}

/// The two registers.
pub struct SleepControl {
    owner: Arc<dyn Owner>,
    state: Mutex<SleepControlState>,
}

impl SleepControl {
    /// Asks `owner` to switch the machine off.
    pub fn new(owner: Arc<dyn Owner>) -> SleepControl {
        SleepControl { owner, state: Mutex::default() }
    }

    /// What it has to remember.
    pub fn save(&self) -> SleepControlState {
        *self.state.lock()
    }

    /// Goes on from what another one remembered.
    pub fn restore(&self, state: SleepControlState) {
        *self.state.lock() = state;
    }

    /// As after power on.
    pub fn reset(&self) {
        *self.state.lock() = SleepControlState::default();
    }
}

impl BusDevice for SleepControl {
    fn name(&self) -> &str {
        "sleep-control"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.save();
        for (n, byte) in data.iter_mut().enumerate() {
            let at = offset.wrapping_add(n as u64);
            *byte = match at {
                0 => state.control,
                1 => state.status,
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (n, &byte) in data.iter().enumerate() {
            let at = offset.wrapping_add(n as u64);
            match at {
                0 => {
                    self.state.lock().control = byte & !ENABLE;
                    if byte & ENABLE != 0 && byte >> TYPE_SHIFT & TYPE_MASK == S5 {
                        self.owner.request(self.name(), Request::PowerOff);
                    }
                }
                1 => self.state.lock().status &= !(byte & WAKE),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock::Requests;
    use super::*;

    #[test]
    fn only_soft_off_switches_off() {
        let requests = Requests::new();
        let registers = SleepControl::new(requests.clone());
        registers.write(0, &[S5 << TYPE_SHIFT]);
        registers.write(0, &[3 << TYPE_SHIFT | ENABLE]);
        assert_eq!(requests.take(), []);
        registers.write(0, &[S5 << TYPE_SHIFT | ENABLE]);
        assert_eq!(requests.take(), [("sleep-control".to_owned(), Request::PowerOff)]);
        let mut data = [0xFF; 4];
        registers.read(0, &mut data);
        assert_eq!(data, [S5 << TYPE_SHIFT, 0, 0, 0]);
    }

    #[test]
    fn the_wake_bit_is_cleared_by_a_one() {
        let registers = SleepControl::new(Requests::new());
        registers.restore(SleepControlState { control: 0, status: WAKE });
        registers.write(1, &[0]);
        assert_eq!(registers.save().status, WAKE);
        registers.write(1, &[WAKE]);
        assert_eq!(registers.save().status, 0);
    }
}
