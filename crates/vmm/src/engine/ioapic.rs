//! The I/O interrupt controller (Intel 82093AA), for engines whose own it is not.
//!
//! # Theory of operation
//!
//! 24 pins; each has a redirection entry, which says what message a local APIC gets when the pin is asserted. A pin that is
//! edge-triggered sends when it rises. A level-triggered one sends when it is high and its entry's *remote IRR* is clear,
//! which sets it; the end of interrupt that a local APIC broadcasts clears it, and if the pin is still high, the message is
//! sent again. A masked entry sends nothing; a rising edge meanwhile is lost, as on hardware.
//!
//! The engine is told the message of each pin ([`Wires::route`]), so that it can turn an eventfd's signal into it without
//! us, and knows the vectors whose end of interrupt we must hear of.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::Msi;
use crate::bus::BusDevice;

/// Pins.
pub const PINS: usize = 24;
/// Where a PC has it.
pub const ADDRESS: u64 = 0xFEC0_0000;
/// Bytes of its registers.
pub const SIZE: u64 = 0x1000;

const REGISTER_SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END_OF_INTERRUPT: u64 = 0x40;

const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const REDIRECTION: u8 = 0x10;

/// Version 0x20, which has the register for an end of interrupt, and the number of the last pin.
const VERSION_VALUE: u32 = 0x20 | (PINS as u32 - 1) << 16;

/// Bits of a redirection entry (82093AA, 3.2.4).
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
/// The delivery mode that lets a PIC decide the vector; there is none here.
const EXTERNAL: u64 = 0x700;
const DELIVERY_MODE: u64 = 0x700;

/// Where messages go.
pub trait Wires: Send + Sync {
    /// Sends a message now.
    fn send(&self, msi: Msi);
    /// From now on a signal of `pin` is this message; `None`: nothing.
    fn route(&self, pin: u32, msi: Option<Msi>);
}

/// All its registers.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct IoApicState {
    select: u8,
    id: u32,
    entries: [u64; PINS],
    /// Levels of the pins, a bit each.
    levels: u32,
}

impl Default for IoApicState {
    fn default() -> IoApicState {
        IoApicState { select: 0, id: 0, entries: [MASKED; PINS], levels: 0 }
    }
}

/// One IOAPIC.
pub struct IoApic {
    state: Mutex<IoApicState>,
    wires: Arc<dyn Wires>,
}

impl IoApic {
    /// One with all pins masked.
    pub fn new(wires: Arc<dyn Wires>) -> IoApic {
        IoApic { state: Mutex::default(), wires }
    }

    /// Drives a pin; one that does not exist is connected to nothing.
    pub fn set_line(&self, pin: u32, level: bool) {
        let Some(entry) = self.state.lock().set_level(pin, level) else { return };
        self.wires.send(entry);
    }

    /// A local APIC has ended the interrupt of this vector.
    pub fn end_of_interrupt(&self, vector: u8) {
        let again = self.state.lock().end(vector);
        again.into_iter().for_each(|msi| self.wires.send(msi));
    }

    /// Its registers.
    pub fn save(&self) -> IoApicState {
        self.state.lock().clone()
    }

    /// Puts registers back.
    pub fn restore(&self, state: &IoApicState) {
        let mut current = self.state.lock();
        *current = state.clone();
        for pin in 0..PINS {
            self.wires.route(pin as u32, current.message(pin));
        }
    }

    fn write_register(&self, value: u32) {
        let mut state = self.state.lock();
        let send = match state.select {
            ID => {
                state.id = value & 0x0F00_0000;
                None
            }
            select => match entry_of(select) {
                Some((pin, high)) => {
                    state.write_entry(pin, high, value);
                    // Under the lock, so that two vCPUs' writes reach the engine in the order of the registers.
                    self.wires.route(pin as u32, state.message(pin));
                    state.assert(pin, false)
                }
                None => None,
            },
        };
        drop(state);
        if let Some(msi) = send {
            self.wires.send(msi);
        }
    }
}

/// The pin of a register of the redirection table, and whether it is the entry's upper half.
fn entry_of(select: u8) -> Option<(usize, bool)> {
    let at = usize::from(select.checked_sub(REDIRECTION)?);
    (at / 2 < PINS).then_some((at / 2, at % 2 == 1))
}

impl IoApicState {
    fn read_register(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            select => match entry_of(select) {
                Some((pin, true)) => (self.entries[pin] >> 32) as u32,
                Some((pin, false)) => self.entries[pin] as u32,
                None => 0,
            },
        }
    }

    fn write_entry(&mut self, pin: usize, high: bool, value: u32) {
        let entry = &mut self.entries[pin];
        let value = u64::from(value);
        let kept = *entry & READ_ONLY;
        *entry =
            if high { *entry & 0xFFFF_FFFF | value << 32 } else { *entry & !0xFFFF_FFFF | value & !READ_ONLY | kept };
        if *entry & LEVEL == 0 {
            // Changing a pin to edge and back is how kernels clear it on controllers without the end register.
            *entry &= !REMOTE_IRR;
        }
    }

    /// What the pin sends, if it may.
    fn message(&self, pin: usize) -> Option<Msi> {
        let entry = self.entries[pin];
        if entry & MASKED != 0 || entry & DELIVERY_MODE == EXTERNAL {
            return None;
        }
        let destination = entry >> 56;
        let logical = entry >> 11 & 1;
        let asserted = 1 << 14;
        // Vector, delivery mode and trigger mode are at the same places in both.
        let data = (entry & (0xFF | DELIVERY_MODE | LEVEL)) as u32 | asserted;
        Some(Msi { address: 0xFEE0_0000 | destination << 12 | logical << 2, data })
    }

    /// What a pin sends that is high: an edge-triggered one only when it has just risen.
    fn assert(&mut self, pin: usize, rises: bool) -> Option<Msi> {
        let msi = self.message(pin)?;
        let entry = &mut self.entries[pin];
        let high = self.levels >> pin & 1 != 0;
        if *entry & LEVEL == 0 {
            return rises.then_some(msi);
        }
        if !high || *entry & REMOTE_IRR != 0 {
            return None;
        }
        *entry |= REMOTE_IRR;
        Some(msi)
    }

    fn set_level(&mut self, pin: u32, level: bool) -> Option<Msi> {
        let at = usize::try_from(pin).ok().filter(|at| *at < PINS)?;
        let before = self.levels >> pin & 1 != 0;
        if !level {
            self.levels &= !(1 << pin);
            return None;
        }
        self.levels |= 1 << pin;
        self.assert(at, !before)
    }

    fn end(&mut self, vector: u8) -> Vec<Msi> {
        let mut again = Vec::new();
        for pin in 0..PINS {
            let entry = self.entries[pin];
            if entry & LEVEL != 0 && entry & REMOTE_IRR != 0 && entry & 0xFF == u64::from(vector) {
                self.entries[pin] &= !REMOTE_IRR;
                again.extend(self.assert(pin, false));
            }
        }
        again
    }
}

impl BusDevice for IoApic {
    fn name(&self) -> &str {
        "ioapic"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        let value = match offset {
            REGISTER_SELECT => state.select.into(),
            WINDOW => state.read_register(),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        bytes.iter_mut().zip(data).for_each(|(byte, value)| *byte = *value);
        match offset {
            REGISTER_SELECT => self.state.lock().select = bytes[0],
            WINDOW => self.write_register(u32::from_le_bytes(bytes)),
            END_OF_INTERRUPT => self.end_of_interrupt(bytes[0]),
            _ => {}
        }
    }
}
