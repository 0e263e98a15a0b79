//! Why a serial port interrupts: four causes, of which the guest sees the most urgent one (PC16550D, table IV).

use super::SerialState;
use super::registers::{LINE_ERRORS, MODEM_CHANGES};

/// Bits of the interrupt enable register.
pub const ENABLE_RECEIVED: u8 = 1 << 0;
pub const ENABLE_TRANSMITTER: u8 = 1 << 1;
pub const ENABLE_LINE: u8 = 1 << 2;
pub const ENABLE_MODEM: u8 = 1 << 3;

/// A cause, as the interrupt identification register says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    /// An error of the receiver; ends when the line status is read.
    Line = 0b0110,
    /// As many bytes as the driver wanted to wait for; ends when there are fewer.
    Received = 0b0100,
    /// Fewer, and no more have come for a while; ends when they are read.
    Timeout = 0b1100,
    /// The transmitter is empty; ends when that is read here, or when it is written to.
    Transmitter = 0b0010,
    /// A modem line has changed; ends when the modem status is read.
    Modem = 0b0000,
}

impl SerialState {
    /// The most urgent cause that is enabled.
    pub fn interrupt(&self) -> Option<Cause> {
        let registers = &self.registers;
        let enabled = |bit| registers.interrupt_enable & bit != 0;
        if enabled(ENABLE_LINE) && registers.line_status() & LINE_ERRORS != 0 {
            Some(Cause::Line)
        } else if enabled(ENABLE_RECEIVED) && !self.fifo.is_empty() {
            // No time passes on this line: what is not enough has been waiting long enough.
            Some(if self.fifo.len() >= registers.trigger() { Cause::Received } else { Cause::Timeout })
        } else if enabled(ENABLE_TRANSMITTER) && registers.transmitter_pending {
            Some(Cause::Transmitter)
        } else if enabled(ENABLE_MODEM) && registers.modem_status() & MODEM_CHANGES != 0 {
            Some(Cause::Modem)
        } else {
            None
        }
    }
}
