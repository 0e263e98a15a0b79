//! The keyboard controller of a PC, as far as kernels use it to reset the machine: ports 0x60 and 0x64.
//!
//! There is no keyboard. The status register says two things for ever: the input buffer is empty, so whoever waits before
//! a command does not wait; and the output buffer is full, so Linux, which empties it before anything else, gives up after
//! 16 bytes (`i8042_flush`: "No controller found") instead of waiting half a second for an answer, several times.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Owner, Request};
use crate::bus::BusDevice;

/// Distance of the status and command port from the data port.
const COMMAND: u64 = 4;
/// OBF: there is a byte to read.
const OUTPUT_FULL: u8 = 1 << 0;
/// The next byte of data is for the output port, whose bit 0 low resets the processor.
const WRITE_OUTPUT_PORT: u8 = 0xD1;
/// Commands from here on pulse the lines of the output port whose bit is zero.
const PULSE: u8 = 0xF0;
const RESET_LINE: u8 = 1 << 0;

/// What a snapshot keeps of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The next byte of data is for the output port.
    pub to_output_port: bool,
}

/// The controller: five ports from 0x60 on, of which it has the first and the last.
pub struct I8042 {
    owner: Arc<dyn Owner>,
    state: Mutex<I8042State>,
}

impl I8042 {
    /// Asks `owner` to reset the machine.
    pub fn new(owner: Arc<dyn Owner>) -> I8042 {
        I8042 { owner, state: Mutex::default() }
    }

    /// What it has to remember.
    pub fn save(&self) -> I8042State {
        *self.state.lock()
    }

    /// Goes on from what another one remembered.
    pub fn restore(&self, state: I8042State) {
        *self.state.lock() = state;
    }

    /// As after power on.
    pub fn reset(&self) {
        *self.state.lock() = I8042State::default();
    }
}

impl BusDevice for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if offset == COMMAND {
            data[0] = OUTPUT_FULL;
        } else if offset == 0 {
            data[0] = 0;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let byte = data[0];
        let to_output_port = match offset {
            COMMAND => {
                self.state.lock().to_output_port = byte == WRITE_OUTPUT_PORT;
                byte >= PULSE
            }
            0 => std::mem::take(&mut self.state.lock().to_output_port),
            _ => false,
        };
        if to_output_port && byte & RESET_LINE == 0 {
            self.owner.request(self.name(), Request::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock::Requests;
    use super::*;

    fn status(controller: &I8042) -> u8 {
        let mut data = [0];
        controller.read(COMMAND, &mut data);
        data[0]
    }

    #[test]
    fn linux_gives_up_after_sixteen_bytes() {
        let controller = I8042::new(Requests::new());
        let mut data = [0];
        for _ in 0..=16 {
            assert_eq!(status(&controller) & OUTPUT_FULL, OUTPUT_FULL);
            controller.read(0, &mut data);
        }
    }

    #[test]
    fn both_ways_to_reset() {
        let requests = Requests::new();
        let controller = I8042::new(requests.clone());
        assert_eq!(status(&controller) & 2, 0, "nobody waits before a command");
        controller.write(COMMAND, &[0xFE]);
        assert_eq!(requests.take(), [("i8042".to_owned(), Request::Reset)]);
        // Gate A20 is opened with bit 0 high, then the reset line is pulled.
        controller.write(COMMAND, &[WRITE_OUTPUT_PORT]);
        controller.write(0, &[0xDF]);
        controller.write(0, &[0xDE]);
        assert_eq!(requests.take(), []);
        controller.write(COMMAND, &[WRITE_OUTPUT_PORT]);
        controller.write(0, &[0xDE]);
        assert_eq!(requests.take().len(), 1);
        for byte in [0xAA, 0xFF, 0xED, 0x20] {
            controller.write(COMMAND, &[byte]);
            controller.write(2, &[0xFE]);
        }
        assert_eq!(requests.take(), []);
    }
}
