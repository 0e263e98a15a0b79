//! MSI-X: interrupts as messages that the driver writes into a table (PCI 3.0, 6.8.2).
//!
//! # Theory of operation
//!
//! What raises an interrupt is a *source*: an eventfd of the device, with the number of the vector that the driver chose
//! for it. Several sources may have the same vector. Each has a route of the engine, whose message is the vector's entry
//! in the table. While the vector or the function is masked the route has none: a signal stays in the eventfd, which *is*
//! the pending bit, and is sent as soon as the route has a message again. So an interrupt does not pass through here,
//! only the table does.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{Bar, BarKind, Capability, MsixBar};
use crate::engine::{EngineError, Msi, MsiRoute, Vm};

/// The capability's number.
pub const CAPABILITY: u8 = 0x11;
/// Bit of message control: messages instead of INTx.
const ENABLE: u16 = 1 << 15;
/// Bit of message control: no vector is sent.
const FUNCTION_MASK: u16 = 1 << 14;
/// Bit of an entry's control: it is not sent.
const ENTRY_MASK: u32 = 1;
/// Bytes of an entry.
const ENTRY: u64 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

const EMPTY: Entry = Entry { address: 0, data: 0, control: ENTRY_MASK };

/// The table, for a snapshot. Which source has which vector is the function's to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    entries: Vec<Entry>,
}

struct Source {
    event: EventFd,
    vector: Option<u16>,
    route: Option<Box<dyn MsiRoute>>,
    /// What the route sends.
    sent: Option<Msi>,
}

struct Inside {
    control: u16,
    entries: Vec<Entry>,
    sources: Vec<Source>,
}

/// One function's messages.
pub struct Msix {
    vm: Arc<dyn Vm>,
    inside: Mutex<Inside>,
}

impl MsixBar {
    /// Where the bits of pending vectors begin: behind the table.
    pub fn pending_offset(self) -> u64 {
        (u64::from(self.vectors) * ENTRY).next_multiple_of(2048)
    }

    /// The BAR for table and pending bits.
    pub fn bar(self) -> Bar {
        let bits = u64::from(self.vectors).div_ceil(64) * 8;
        Bar { kind: BarKind::Memory32, size: (self.pending_offset() + bits).next_power_of_two().max(4096) }
    }

    /// The capability that names it.
    pub fn capability(self) -> Capability {
        let place = |offset: u64| (offset as u32 | self.bar as u32).to_le_bytes();
        let mut body = (self.vectors - 1).to_le_bytes().to_vec();
        body.extend(place(0));
        body.extend(place(self.pending_offset()));
        Capability { id: CAPABILITY, body, writable: (ENABLE | FUNCTION_MASK).to_le_bytes().to_vec() }
    }
}

impl Msix {
    /// A table of `vectors` entries, all masked.
    pub fn new(vm: Arc<dyn Vm>, vectors: u16) -> Msix {
        let entries = vec![EMPTY; usize::from(vectors)];
        Msix { vm, inside: Mutex::new(Inside { control: 0, entries, sources: Vec::new() }) }
    }

    /// Whether the driver has it on.
    pub fn enabled(&self) -> bool {
        self.inside.lock().control & ENABLE != 0
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.inside.lock().entries.len() as u16
    }

    /// Adds a source without a vector; returns its number.
    ///
    /// # Errors
    /// No descriptor for the event.
    pub fn add_source(&self, event: &EventFd) -> std::io::Result<usize> {
        let event = event.try_clone()?;
        let mut inside = self.inside.lock();
        inside.sources.push(Source { event, vector: None, route: None, sent: None });
        Ok(inside.sources.len() - 1)
    }

    /// The driver chooses a vector for a source, or none.
    ///
    /// # Errors
    /// The engine refused: the source has no vector (virtio 1.2, 4.1.5.1.2.1 wants to know that).
    pub fn set_vector(&self, source: usize, vector: Option<u16>) -> Result<(), EngineError> {
        let inside = &mut *self.inside.lock();
        let Some(source) = inside.sources.get_mut(source) else { return Ok(()) };
        source.vector = vector.filter(|&vector| usize::from(vector) < inside.entries.len());
        let updated = source.update(&*self.vm, inside.control, &inside.entries);
        if updated.is_err() {
            source.vector = None;
            source.route = None;
        }
        updated
    }

    /// The driver has written message control.
    pub fn set_control(&self, control: u16) {
        let control = control & (ENABLE | FUNCTION_MASK);
        let mut inside = self.inside.lock();
        if inside.control != control {
            inside.control = control;
            inside.update(&*self.vm, |_| true);
        }
    }

    /// Reads the table or the pending bits.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let inside = self.inside.lock();
        let vectors = inside.entries.len() as u64;
        let pending = MsixBar { bar: 0, vectors: vectors as u16 }.pending_offset();
        for (at, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(at as u64);
            *byte = if at < vectors * ENTRY {
                inside.entries[(at / ENTRY) as usize].byte(at % ENTRY)
            } else if at >= pending && (at - pending) * 8 < vectors {
                inside.pending_bits((at - pending) * 8)
            } else {
                0
            };
        }
    }

    /// Writes the table: 32 or 64 aligned bits, as drivers have to (PCI 3.0, 6.8.2). Pending bits are read-only.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if !(data.len() == 4 || data.len() == 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut inside = self.inside.lock();
        let Ok(index) = usize::try_from(offset / ENTRY) else { return };
        let Some(entry) = inside.entries.get_mut(index) else { return };
        let before = *entry;
        for (word, bytes) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            entry.set(offset % ENTRY / 4 + word as u64, value);
        }
        // While an entry is masked what it holds concerns nobody.
        if *entry != before && (entry.message().is_some() || before.message().is_some()) {
            inside.update(&*self.vm, |vector| usize::from(vector) == index);
        }
    }

    /// What is to be saved.
    pub fn save(&self) -> MsixState {
        let inside = self.inside.lock();
        MsixState { control: inside.control, entries: inside.entries.clone() }
    }

    /// Goes on from what was saved. Returns whether it was of as many vectors; otherwise nothing has changed.
    pub fn restore(&self, state: &MsixState) -> bool {
        let mut inside = self.inside.lock();
        if state.entries.len() != inside.entries.len() {
            return false;
        }
        (inside.control, inside.entries) = (state.control & (ENABLE | FUNCTION_MASK), state.entries.clone());
        inside.update(&*self.vm, |_| true);
        true
    }

    /// As after power-on: sources stay, without a vector.
    pub fn reset(&self) {
        let mut inside = self.inside.lock();
        inside.control = 0;
        inside.entries.fill(EMPTY);
        inside.sources.iter_mut().for_each(|source| source.vector = None);
        inside.update(&*self.vm, |_| true);
    }
}

impl Inside {
    /// Brings the routes of some vectors up to date. If the engine refuses, the interrupt stays as it was: there is nobody
    /// in a write to a register who could be told.
    fn update(&mut self, vm: &dyn Vm, concerns: impl Fn(u16) -> bool) {
        for source in &mut self.sources {
            if source.vector.is_none_or(&concerns) {
                let _ = source.update(vm, self.control, &self.entries);
            }
        }
    }

    /// Eight vectors' pending bits.
    fn pending_bits(&self, first: u64) -> u8 {
        let waiting = self.sources.iter().filter(|source| source.route.is_some() && source.sent.is_none());
        let mut bits = 0;
        for source in waiting {
            let bit = source.vector.and_then(|vector| u64::from(vector).checked_sub(first)).filter(|bit| *bit < 8);
            if let Some(bit) = bit
                && signalled(&source.event)
            {
                bits |= 1 << bit;
            }
        }
        bits
    }
}

impl Source {
    fn update(&mut self, vm: &dyn Vm, control: u16, entries: &[Entry]) -> Result<(), EngineError> {
        let Some(vector) = self.vector.filter(|_| control & ENABLE != 0) else {
            (self.route, self.sent) = (None, None);
            return Ok(());
        };
        let message = entries[usize::from(vector)].message().filter(|_| control & FUNCTION_MASK == 0);
        if self.route.is_none() {
            (self.route, self.sent) = (Some(vm.attach_msi(&self.event)?), None);
        }
        if let Some(route) = &self.route
            && self.sent != message
        {
            route.set(message)?;
            self.sent = message;
        }
        Ok(())
    }
}

impl Entry {
    fn message(&self) -> Option<Msi> {
        (self.control & ENTRY_MASK == 0).then_some(Msi { address: self.address, data: self.data })
    }

    fn byte(&self, at: u64) -> u8 {
        let whole = u128::from(self.control) << 96 | u128::from(self.data) << 64 | u128::from(self.address);
        whole.to_le_bytes()[at as usize]
    }

    fn set(&mut self, word: u64, value: u32) {
        let wide = u64::from(value);
        match word {
            // The two lowest bits of an address are zero (6.8.2.9).
            0 => self.address = self.address & !u64::from(u32::MAX) | wide & !0b11,
            1 => self.address = self.address & u64::from(u32::MAX) | wide << 32,
            2 => self.data = value,
            _ => self.control = value & ENTRY_MASK,
        }
    }
}

/// Whether a signal waits in `event`; leaves it there.
fn signalled(event: &EventFd) -> bool {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, which lives over the call; a timeout of 0 does not wait.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready > 0 && poll.revents & libc::POLLIN != 0
}
