//! The 256 bytes by which a function is known (PCI 3.0, 6.1), with what of them may be written.

use serde::{Deserialize, Serialize};

use super::{Bar, BarKind, Capability, Description};

/// Bytes of it. What ECAM shows behind them reads as zero: no extended capabilities.
pub const SIZE: usize = 256;

/// Offsets of registers in a type 0 header (PCI 3.0, 6.1, figure 6-1).
pub mod register {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const VENDOR_ID: usize = 0x00;
    pub const DEVICE_ID: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION_ID: usize = 0x08;
    pub const CACHE_LINE_SIZE: usize = 0x0C;
    pub const BARS: usize = 0x10;
    pub const SUBSYSTEM_VENDOR_ID: usize = 0x2C;
    pub const SUBSYSTEM_ID: usize = 0x2E;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3C;
    pub const INTERRUPT_PIN: usize = 0x3D;
    pub const FIRST_CAPABILITY: usize = 0x40;
}

/// Bits of the command register (PCI 3.0, 6.2.2).
pub mod command {
    /// Answers at its port BARs.
    pub const IO: u16 = 1 << 0;
    /// Answers at its memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// May send messages and reach memory.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// INTx stays silent.
    pub const INTERRUPT_DISABLE: u16 = 1 << 10;
    /// Those that can be written; parity and SERR are kept, and mean nothing.
    pub const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | 1 << 6 | 1 << 8 | INTERRUPT_DISABLE;
}

/// Bit of the status register: the function asserts INTx.
const INTERRUPT_STATUS: u8 = 1 << 3;
/// Bit of the status register: there are capabilities.
const HAS_CAPABILITIES: u16 = 1 << 4;

/// One function's configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: [Option<Bar>; 6],
    /// Where the next capability goes, and where the pointer to it is.
    free: usize,
    link: usize,
}

/// What a driver wrote of it, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// All of it.
    bytes: Vec<u8>,
}

impl ConfigSpace {
    /// A function's, after reset.
    ///
    /// # Errors
    /// What of `description` cannot be.
    pub fn new(description: &Description) -> Result<ConfigSpace, String> {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [None; 6],
            free: register::FIRST_CAPABILITY,
            link: register::CAPABILITIES,
        };
        let identity = &description.identity;
        space.put(register::VENDOR_ID, &identity.vendor.to_le_bytes());
        space.put(register::DEVICE_ID, &identity.device.to_le_bytes());
        space.put(register::REVISION_ID, &[identity.revision]);
        space.put(register::REVISION_ID + 1, &identity.class.to_le_bytes()[..3]);
        space.put(register::SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        space.put(register::SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        space.allow(register::COMMAND, &command::WRITABLE.to_le_bytes());
        space.allow(register::CACHE_LINE_SIZE, &[0xFF]);
        if description.pin {
            space.allow(register::INTERRUPT_LINE, &[0xFF]);
            space.put(register::INTERRUPT_PIN, &[1]);
        }
        for (index, bar) in description.bars.iter().enumerate() {
            if let Some(bar) = bar {
                space.add_bar(index, *bar)?;
            }
        }
        for capability in &description.capabilities {
            space.add_capability(capability)?;
        }
        Ok(space)
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// Adds a BAR (PCI 3.0, 6.2.5.1). Sizing needs no state: the bits below its size cannot be written.
    ///
    /// # Errors
    /// Why there can be none of this kind and size.
    pub fn add_bar(&mut self, index: usize, bar: Bar) -> Result<(), String> {
        let (least, most, type_bits) = match bar.kind {
            BarKind::Io => (4, 256, 0b01),
            BarKind::Memory32 => (16, 1 << 31, 0b0000),
            BarKind::Memory64 => (16, 1 << 47, 0b0100),
        };
        if !bar.size.is_power_of_two() || bar.size < least || bar.size > most {
            return Err(format!(
                "BAR {index} of {:#x} bytes; allowed are powers of two from {least:#x} to {most:#x}",
                bar.size
            ));
        }
        let wide = bar.kind == BarKind::Memory64;
        let upper = index.checked_sub(1).and_then(|below| self.bars.get(below).copied().flatten());
        let taken = self.bars.get(index).is_none_or(Option::is_some)
            || upper.is_some_and(|below| below.kind == BarKind::Memory64)
            || wide && self.bars.get(index + 1).is_none_or(Option::is_some);
        if taken {
            return Err(format!("there is no free BAR {index}"));
        }
        self.bars[index] = Some(bar);
        let at = register::BARS + 4 * index;
        let mask = match bar.kind {
            BarKind::Io => !(bar.size - 1) & 0xFFFF,
            BarKind::Memory32 | BarKind::Memory64 => !(bar.size - 1),
        };
        self.put(at, &[type_bits]);
        self.allow(at, &(mask as u32).to_le_bytes());
        if wide {
            self.allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        Ok(())
    }

    /// Adds a capability at the end of the list; returns its offset.
    ///
    /// # Errors
    /// There is no room.
    pub fn add_capability(&mut self, capability: &Capability) -> Result<usize, String> {
        let at = self.free;
        let end = at + 2 + capability.body.len();
        if end > SIZE || capability.writable.len() > capability.body.len() {
            return Err(format!("a capability {:#x} of {} bytes does not fit", capability.id, capability.body.len()));
        }
        self.put(at, &[capability.id, 0]);
        self.put(at + 2, &capability.body);
        self.allow(at + 2, &capability.writable);
        self.bytes[self.link] = at as u8;
        (self.link, self.free) = (at + 1, end.next_multiple_of(4));
        self.bytes[register::STATUS] |= HAS_CAPABILITIES as u8;
        Ok(at)
    }

    /// Reads, in any width and alignment; zeroes behind the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(at).and_then(|at| self.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes what of it can be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, new) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(at).filter(|&at| at < SIZE) else { return };
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | new & mask;
        }
    }

    /// Sets what a driver cannot.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        self.put(offset, data);
    }

    /// The 16 bits at `offset`.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The 32 bits at `offset`.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from(self.word(offset + 2)) << 16 | u32::from(self.word(offset))
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.word(register::COMMAND)
    }

    /// The bit in the status register that shows INTx.
    pub fn show_interrupt(&mut self, asserted: bool) {
        let status = &mut self.bytes[register::STATUS];
        *status = if asserted { *status | INTERRUPT_STATUS } else { *status & !INTERRUPT_STATUS };
    }

    /// The BARs.
    pub fn bars(&self) -> &[Option<Bar>; 6] {
        &self.bars
    }

    /// The address in a BAR.
    pub fn bar_address(&self, index: usize) -> u64 {
        let at = register::BARS + 4 * index;
        match self.bars[index].map(|bar| bar.kind) {
            None => 0,
            Some(BarKind::Io) => u64::from(self.dword(at) & !0b11),
            Some(BarKind::Memory32) => u64::from(self.dword(at) & !0xF),
            Some(BarKind::Memory64) => u64::from(self.dword(at + 4)) << 32 | u64::from(self.dword(at) & !0xF),
        }
    }

    /// Where a BAR is to answer: `None` while decoding is off. An address of 0 is one that nobody has assigned.
    pub fn bar_decoded(&self, index: usize) -> Option<u64> {
        let kind = self.bars[index]?.kind;
        let bit = if kind == BarKind::Io { command::IO } else { command::MEMORY };
        let address = self.bar_address(index);
        (self.command() & bit != 0 && address != 0).then_some(address)
    }

    /// Gives a BAR an address, as firmware does.
    pub fn assign_bar(&mut self, index: usize, address: u64) {
        let at = register::BARS + 4 * index;
        self.write(at, &(address as u32).to_le_bytes());
        if self.bars[index].is_some_and(|bar| bar.kind == BarKind::Memory64) {
            self.write(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// What is to be saved.
    pub fn save(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    /// Writes what was saved, as a driver could have.
    pub fn restore(&mut self, state: &ConfigState) {
        self.write(0, &state.bytes);
    }

    /// Vendor and device of a saved state and of this one, if they differ.
    pub fn differs(&self, state: &ConfigState) -> Option<(String, String)> {
        let identity = |bytes: &[u8]| match bytes {
            [a, b, c, d, ..] => format!("{b:02x}{a:02x}:{d:02x}{c:02x}"),
            _ => "nothing".to_owned(),
        };
        let (saved, own) = (identity(&state.bytes), identity(&self.bytes));
        (saved != own).then_some((saved, own))
    }
}
