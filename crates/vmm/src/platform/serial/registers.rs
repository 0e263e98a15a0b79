//! The registers of a 16550A (PC16550D, table II), and what reading and writing them does.

use serde::{Deserialize, Serialize};

use super::interrupts::{Cause, ENABLE_TRANSMITTER};
use super::{FIFO, SerialState};

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
/// Read: interrupt identification. Written: FIFO control.
const INTERRUPT_IDENTIFICATION: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const MODEM_STATUS: u64 = 6;
const SCRATCH: u64 = 7;

/// Line control: the first two registers are the divisor.
const DIVISOR_LATCH: u8 = 1 << 7;

/// FIFO control.
const FIFO_ENABLE: u8 = 1 << 0;
const FIFO_CLEAR_RECEIVER: u8 = 1 << 1;
const FIFO_TRIGGER_SHIFT: u8 = 6;

/// Interrupt identification: there is none; and that FIFOs are on.
const NO_INTERRUPT: u8 = 1 << 0;
const FIFOS_ON: u8 = 0b1100_0000;

/// Modem control.
const DTR: u8 = 1 << 0;
const RTS: u8 = 1 << 1;
const OUT1: u8 = 1 << 2;
const OUT2: u8 = 1 << 3;
pub const LOOPBACK: u8 = 1 << 4;
const MODEM_CONTROL_BITS: u8 = 0x1F;

/// Line status.
pub const LINE_DATA_READY: u8 = 1 << 0;
const LINE_OVERRUN: u8 = 1 << 1;
/// Overrun, parity, framing, break.
pub const LINE_ERRORS: u8 = 0b0001_1110;
const LINE_TRANSMITTER_EMPTY: u8 = 0b0110_0000;

/// Modem status: lines, and which of them have changed since it was read.
const CTS: u8 = 1 << 4;
const DSR: u8 = 1 << 5;
const RING: u8 = 1 << 6;
const CARRIER: u8 = 1 << 7;
pub const MODEM_CHANGES: u8 = 0x0F;
const RING_ENDED: u8 = 1 << 2;
/// The other end is there and ready.
const CONNECTED: u8 = CTS | DSR | CARRIER;

/// What a port of the guest's is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    pub modem_control: u8,
    line_status: u8,
    modem_status: u8,
    scratch: u8,
    divisor: u16,
    /// The transmitter has become empty, and the guest was not told.
    pub transmitter_pending: bool,
    /// A cause has ended with this write, even if it is there again.
    interrupt_ended: bool,
}

impl Default for Registers {
    fn default() -> Registers {
        Registers {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            line_status: 0,
            modem_status: CONNECTED,
            scratch: 0,
            // 9600 baud of 115200.
            divisor: 12,
            transmitter_pending: false,
            interrupt_ended: false,
        }
    }
}

impl Registers {
    /// Bytes that the receiver holds.
    pub fn fifo_size(&self) -> usize {
        if self.fifo_control & FIFO_ENABLE != 0 { FIFO } else { 1 }
    }

    /// Bytes for which the driver wants to be interrupted.
    pub fn trigger(&self) -> usize {
        if self.fifo_control & FIFO_ENABLE != 0 {
            [1, 4, 8, 14][usize::from(self.fifo_control >> FIFO_TRIGGER_SHIFT)]
        } else {
            1
        }
    }

    pub fn line_status(&self) -> u8 {
        self.line_status | LINE_TRANSMITTER_EMPTY
    }

    pub fn set_line_status(&mut self, bit: u8, on: bool) {
        self.line_status = if on { self.line_status | bit } else { self.line_status & !bit };
    }

    pub fn modem_status(&self) -> u8 {
        self.modem_status
    }

    /// In loopback the modem's outputs are its inputs.
    fn update_modem_status(&mut self) {
        let control = self.modem_control;
        let lines = if control & LOOPBACK == 0 {
            CONNECTED
        } else {
            [(RTS, CTS), (DTR, DSR), (OUT1, RING), (OUT2, CARRIER)]
                .into_iter()
                .filter(|(output, _)| control & output != 0)
                .fold(0, |lines, (_, input)| lines | input)
        };
        let mut changed = (lines ^ self.modem_status) >> 4;
        // Of the ring line, only its end counts (PC16550D, 8.8: TERI).
        if lines & RING != 0 {
            changed &= !RING_ENDED;
        }
        self.modem_status = lines | self.modem_status & MODEM_CHANGES | changed;
    }
}

impl SerialState {
    fn divisor_latch(&self) -> bool {
        self.registers.line_control & DIVISOR_LATCH != 0
    }

    /// What a read of a register gives, after what it does.
    pub fn read(&mut self, offset: u64) -> u8 {
        let latch = self.divisor_latch();
        let [low, high] = self.registers.divisor.to_le_bytes();
        match offset {
            DATA if latch => low,
            DATA => {
                let byte = self.fifo.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            INTERRUPT_ENABLE if latch => high,
            INTERRUPT_ENABLE => self.registers.interrupt_enable,
            INTERRUPT_IDENTIFICATION => {
                let cause = self.interrupt();
                if cause == Some(Cause::Transmitter) {
                    self.registers.transmitter_pending = false;
                }
                let fifos = if self.registers.fifo_control & FIFO_ENABLE != 0 { FIFOS_ON } else { 0 };
                cause.map_or(NO_INTERRUPT, |cause| cause as u8) | fifos
            }
            LINE_CONTROL => self.registers.line_control,
            MODEM_CONTROL => self.registers.modem_control,
            LINE_STATUS => {
                let status = self.registers.line_status();
                self.registers.line_status &= !LINE_ERRORS;
                status
            }
            MODEM_STATUS => {
                let status = self.registers.modem_status;
                self.registers.modem_status &= !MODEM_CHANGES;
                status
            }
            SCRATCH => self.registers.scratch,
            _ => 0xFF,
        }
    }

    /// Writes a register. Returns whether the byte leaves by the line.
    pub fn write(&mut self, offset: u64, byte: u8) -> bool {
        let latch = self.divisor_latch();
        let registers = &mut self.registers;
        match offset {
            DATA if latch => registers.divisor = registers.divisor & 0xFF00 | u16::from(byte),
            DATA => return self.transmit(byte),
            INTERRUPT_ENABLE if latch => registers.divisor = registers.divisor & 0x00FF | u16::from(byte) << 8,
            INTERRUPT_ENABLE => {
                let enabled = byte & !registers.interrupt_enable;
                registers.interrupt_enable = byte & 0x0F;
                // Enabling it while the transmitter is empty, which it always is, interrupts at once (PC16550D, 8.7).
                if enabled & ENABLE_TRANSMITTER != 0 {
                    registers.transmitter_pending = true;
                }
            }
            INTERRUPT_IDENTIFICATION => self.control_fifo(byte),
            LINE_CONTROL => registers.line_control = byte,
            MODEM_CONTROL => {
                registers.modem_control = byte & MODEM_CONTROL_BITS;
                registers.update_modem_status();
                self.refill();
            }
            SCRATCH => registers.scratch = byte,
            _ => {}
        }
        false
    }

    fn transmit(&mut self, byte: u8) -> bool {
        self.registers.interrupt_ended = self.interrupt() == Some(Cause::Transmitter);
        self.registers.transmitter_pending = true;
        if self.registers.modem_control & LOOPBACK == 0 {
            return true;
        }
        if self.fifo.len() < self.registers.fifo_size() {
            self.fifo.push_back(byte);
        } else {
            self.registers.set_line_status(LINE_OVERRUN, true);
        }
        self.refill();
        false
    }

    fn control_fifo(&mut self, byte: u8) {
        // Switching the FIFOs on or off empties them; the other bits count only while they are on (PC16550D, 8.5).
        let switched = (byte ^ self.registers.fifo_control) & FIFO_ENABLE != 0;
        if switched || byte & FIFO_ENABLE != 0 && byte & FIFO_CLEAR_RECEIVER != 0 {
            self.fifo.clear();
        }
        self.registers.fifo_control = byte & (FIFO_ENABLE | 3 << FIFO_TRIGGER_SHIFT);
        self.refill();
    }

    /// Whether the last write ended the cause that was shown.
    pub fn take_interrupt_end(&mut self) -> bool {
        std::mem::take(&mut self.registers.interrupt_ended)
    }
}
