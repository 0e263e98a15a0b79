//! The serial port: a 16550A (Texas Instruments TL16C550C datasheet; National Semiconductor PC16550D), eight ports.
//!
//! # Theory of operation
//!
//! A line of infinite speed: a byte written to the transmitter has left when the write returns, so the transmitter is always
//! empty, and its interrupt is due again after every byte. What the guest says goes into an [`Output`], which its owner
//! empties; the guest never waits for the owner. What the owner says waits in a queue of its own, from where the 16 bytes of
//! the receiver's FIFO are filled as the guest reads them, so nothing is lost that was taken. An owner who has more to say
//! than there is room for is told, if it asks, when half of the room is free again.
//!
//! Interrupts are a level: high while there is a cause that the guest has enabled. A PC's interrupt controller wants an edge
//! for each, so a cause that ends and comes again while the level stays high is shown as a short low.
//!
//! Unlike on a PC, the level does not depend on OUT2: kernels written for other virtual machines do without.

mod interrupts;
mod output;
mod registers;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{BadState, Line};
use crate::bus::BusDevice;
pub use output::Output;
use registers::{LINE_DATA_READY, LOOPBACK, Registers};

/// Bytes of input that wait until the guest reads.
pub const INPUT_MAX: usize = 1 << 16;
/// Bytes in the receiver's FIFO.
const FIFO: usize = 16;

/// What a snapshot keeps of it. Output that was not taken stays with the output's owner.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    registers: Registers,
    fifo: VecDeque<u8>,
    waiting: VecDeque<u8>,
}

impl SerialState {
    /// Fills the receiver from what waits. In loopback the receiver is not connected to the line.
    fn refill(&mut self) {
        if self.registers.modem_control & LOOPBACK == 0 {
            let room = self.registers.fifo_size().saturating_sub(self.fifo.len());
            self.fifo.extend(self.waiting.drain(..room.min(self.waiting.len())));
        }
        self.registers.set_line_status(LINE_DATA_READY, !self.fifo.is_empty());
    }
}

/// The port.
pub struct Serial {
    line: Line,
    output: Output,
    state: Mutex<SerialState>,
    /// The owner shall be told when there is room for input.
    room_awaited: AtomicBool,
}

impl Serial {
    /// A port that interrupts by `line`, and whose output goes to `output`.
    pub fn new(line: Line, output: Output) -> Serial {
        Serial { line, output, state: Mutex::default(), room_awaited: AtomicBool::new(false) }
    }

    /// Where the guest's output is.
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// Takes as much of `bytes` as there is room for, for the guest to read; returns how many.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock();
        let taken = bytes.len().min(INPUT_MAX - state.waiting.len());
        state.waiting.extend(&bytes[..taken]);
        state.refill();
        self.show(&state);
        taken
    }

    /// Signals the output's eventfd once when there is room for half of [`INPUT_MAX`], or now if there is.
    pub fn await_room(&self) {
        let state = self.state.lock();
        self.room_awaited.store(true, Ordering::Relaxed);
        self.tell_of_room(&state);
    }

    fn tell_of_room(&self, state: &SerialState) {
        if state.waiting.len() <= INPUT_MAX / 2 && self.room_awaited.load(Ordering::Relaxed) {
            self.room_awaited.store(false, Ordering::Relaxed);
            self.output.signal();
        }
    }

    /// Bytes of input that the guest has not read.
    pub fn unread(&self) -> usize {
        let state = self.state.lock();
        state.waiting.len() + state.fifo.len()
    }

    /// What it has to remember.
    pub fn save(&self) -> SerialState {
        self.state.lock().clone()
    }

    /// Goes on from what another one remembered, and drives the line.
    ///
    /// # Errors
    /// [`BadState`].
    pub fn restore(&self, state: SerialState) -> Result<(), BadState> {
        if state.fifo.len() > FIFO || state.waiting.len() > INPUT_MAX {
            let what = format!("{} bytes in a FIFO of {FIFO}, {} waiting", state.fifo.len(), state.waiting.len());
            return Err(BadState { device: "serial", what });
        }
        let mut now = self.state.lock();
        *now = state;
        now.refill();
        self.line.repeat(now.interrupt().is_some());
        Ok(())
    }

    /// As after power on. Input that was still waiting is there for the next guest.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        let waiting = std::mem::take(&mut state.waiting);
        *state = SerialState { waiting, ..SerialState::default() };
        state.refill();
        self.line.repeat(false);
    }

    fn show(&self, state: &SerialState) {
        self.line.set(state.interrupt().is_some());
    }
}

impl BusDevice for Serial {
    fn name(&self) -> &str {
        "serial"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        for (n, byte) in data.iter_mut().enumerate() {
            let at = offset.wrapping_add(n as u64);
            *byte = state.read(at);
        }
        self.tell_of_room(&state);
        self.show(&state);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        for (n, &byte) in data.iter().enumerate() {
            let at = offset.wrapping_add(n as u64);
            if state.write(at, byte) {
                self.output.put(byte);
            }
            if state.take_interrupt_end() {
                self.line.set(false);
            }
        }
        self.show(&state);
    }
}
