//! The keyboard controller of a PC, as far as kernels use it to reset the machine: ports 0x60 and 0x64.
//!
//! There is no keyboard. The input buffer is always empty, so whoever waits before a command does not wait. A command that
//! has an answer gets it, once: then the output buffer is empty again. The answers say that the controller is well and that
//! nothing is plugged in.
//!
//! After power on, [`LEFT_OVER`] bytes can be read that mean nothing. Linux empties the buffer before anything else, and
//! gives up after 16 bytes (`i8042_flush`: "No controller found") instead of looking for a keyboard and a mouse for seconds;
//! a kernel that reads until there is nothing more comes to an end too.

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
/// The next byte of data is for the controller itself: its command byte.
const WRITE_COMMAND_BYTE: u8 = 0x60;
/// The next byte of data is for the output buffer, as if it came from the keyboard or the mouse.
const ECHO: [u8; 2] = [0xD2, 0xD3];
/// Bytes in the output buffer after power on: one more than Linux reads.
const LEFT_OVER: u8 = 17;
/// Commands from here on pulse the lines of the output port whose bit is zero.
const PULSE: u8 = 0xF0;
const RESET_LINE: u8 = 1 << 0;

/// What a snapshot keeps of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The last command, if it waits for a byte of data.
    pub command: Option<u8>,
    /// What the guest reads next.
    pub answer: Option<u8>,
    /// Bytes of [`LEFT_OVER`] that were not read.
    pub left_over: u8,
    /// The command byte: interrupts, clocks, translation. Nothing depends on it.
    pub command_byte: u8,
}

impl Default for I8042State {
    /// As after power on.
    fn default() -> I8042State {
        I8042State { command: None, answer: None, left_over: LEFT_OVER, command_byte: 0 }
    }
}

impl I8042State {
    /// The status register.
    fn status(&self) -> u8 {
        if self.answer.is_some() || self.left_over > 0 { OUTPUT_FULL } else { 0 }
    }

    /// A byte out of the output buffer; what is read from an empty one means nothing.
    fn take(&mut self) -> u8 {
        if self.answer.is_none() {
            self.left_over = self.left_over.saturating_sub(1);
        }
        self.answer.take().unwrap_or(0)
    }

    /// The answer of a command that has one (IBM PS/2 Hardware Interface Technical Reference, keyboard controller).
    fn answer_to(&self, command: u8) -> Option<u8> {
        Some(match command {
            0x20 => self.command_byte,
            // Of the output port: the reset line and gate A20 are high.
            0xD0 => 0x03,
            // The controller is well.
            0xAA => 0x55,
            // The clock line of the mouse, of the keyboard, is stuck low: nobody is there.
            0xA9 | 0xAB => 0x01,
            // Of the input port: the keyboard is not locked.
            0xC0 => 0x80,
            _ => return None,
        })
    }

    /// Takes a command. Returns what is pulsed.
    fn command(&mut self, command: u8) -> Option<u8> {
        // Who gives a command wants its answer, and no other.
        self.left_over = 0;
        self.answer = self.answer_to(command);
        self.command = None;
        if command >= PULSE {
            return Some(command);
        }
        if command == WRITE_OUTPUT_PORT || command == WRITE_COMMAND_BYTE || ECHO.contains(&command) {
            self.command = Some(command);
        }
        None
    }

    /// Takes a byte of data. Returns what is on the output port now, if that is whom it was for.
    fn data(&mut self, byte: u8) -> Option<u8> {
        match self.command.take()? {
            WRITE_OUTPUT_PORT => return Some(byte),
            WRITE_COMMAND_BYTE => self.command_byte = byte,
            _ => self.answer = Some(byte),
        }
        None
    }
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
        match offset {
            COMMAND => data[0] = self.state.lock().status(),
            0 => data[0] = self.state.lock().take(),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let lines = match offset {
            COMMAND => self.state.lock().command(data[0]),
            0 => self.state.lock().data(data[0]),
            _ => None,
        };
        if lines.is_some_and(|lines| lines & RESET_LINE == 0) {
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

    fn read(controller: &I8042) -> u8 {
        let mut data = [0];
        controller.read(0, &mut data);
        data[0]
    }

    #[test]
    fn who_empties_the_buffer_comes_to_an_end() {
        let controller = I8042::new(Requests::new());
        let mut count = 0;
        while status(&controller) & OUTPUT_FULL != 0 {
            assert_eq!(read(&controller), 0);
            count += 1;
            assert!(count <= LEFT_OVER);
        }
        assert_eq!(count, LEFT_OVER);
    }

    #[test]
    fn a_command_is_answered_once() {
        let controller = I8042::new(Requests::new());
        for (command, answer) in [(0xAA, 0x55), (0xAB, 1), (0xA9, 1), (0x20, 0)] {
            controller.write(COMMAND, &[command]);
            assert_eq!(status(&controller), OUTPUT_FULL, "command {command:#x}");
            assert_eq!(read(&controller), answer, "command {command:#x}");
            assert_eq!(status(&controller), 0, "command {command:#x}");
        }
        controller.write(COMMAND, &[0xAD]);
        assert_eq!(status(&controller), 0, "to disable the keyboard has no answer");
        controller.write(COMMAND, &[WRITE_COMMAND_BYTE]);
        controller.write(0, &[0x65]);
        assert_eq!(status(&controller), 0);
        controller.write(COMMAND, &[0x20]);
        assert_eq!(read(&controller), 0x65);
        controller.write(COMMAND, &[ECHO[0]]);
        controller.write(0, &[0x1C]);
        assert_eq!((status(&controller), read(&controller), status(&controller)), (OUTPUT_FULL, 0x1C, 0));
        let state = controller.save();
        controller.reset();
        assert_eq!(status(&controller), OUTPUT_FULL);
        controller.restore(state);
        assert_eq!(status(&controller), 0);
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
