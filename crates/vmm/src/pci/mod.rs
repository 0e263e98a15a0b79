//! PCI: how a guest finds devices, gives them addresses, and gets their interrupts (PCI Local Bus 3.0; PCI Express Base 4.0
//! for ECAM).
//!
//! # Theory of operation
//!
//! A device model is a [`PciFunction`]: it says once what it is, and answers accesses to its base address registers
//! (BARs). Everything a driver does to any PCI device alike is here: the [`PciRoot`] keeps each function's
//! [`ConfigSpace`], reached by ports 0xCF8 and 0xCFC or by ECAM; when the driver gives a BAR an address and switches
//! decoding on, the root puts the BAR on the bus of ports or of addresses, and takes it away when that changes. A function
//! never knows where it is, unless it asks ([`PciFunction::bar_moved`]).
//!
//! Interrupts of a function go through its [`Pins`]: either the level of INTA, or eventfds ([`Pins::attach`]), each
//! of which is a message of MSI-X while the driver has that on ([`Msix`]), and otherwise is turned into a level by a thread
//! ([`IntxThread`]), for the guests that know nothing better.

mod config_space;
mod host_bridge;
mod intx;
mod msix;
mod pins;
mod ports;
mod root;

pub use config_space::{ConfigSpace, command, register};
pub use host_bridge::HostBridge;
pub use intx::IntxThread;
pub use msix::{Msix, MsixState};
pub use pins::{Pins, PinsState};
pub use ports::ConfigPorts;
pub use root::{Ecam, PciRoot, PciState, Windows};

use std::sync::Arc;

use crate::bus::Range;

/// What a guest reads to choose a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Who made it.
    pub vendor: u16,
    /// Which of the vendor's devices it is.
    pub device: u16,
    /// Its revision.
    pub revision: u8,
    /// Base class, sub-class and programming interface: 0x020000 is an Ethernet card.
    pub class: u32,
    /// Who made the card.
    pub subsystem_vendor: u16,
    /// Which of that vendor's cards it is.
    pub subsystem: u16,
}

/// Which addresses a BAR is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes the next BAR as well.
    Memory64,
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Which addresses.
    pub kind: BarKind,
    /// How many: a power of two, at least 4 ports or 16 bytes.
    pub size: u64,
}

/// A capability that a driver finds in the list (PCI 3.0, 6.7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its kind.
    pub id: u8,
    /// What follows the pointer to the next one.
    pub body: Vec<u8>,
    /// Which bits of that a driver may write; shorter than the body: the rest is read-only.
    pub writable: Vec<u8>,
}

/// Where MSI-X has its registers: a memory BAR that is nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixBar {
    /// Which BAR.
    pub bar: usize,
    /// How many vectors: 1 to 2048.
    pub vectors: u16,
}

/// Everything about a function that never changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What it is.
    pub identity: Identity,
    /// Its BARs, without that of MSI-X.
    pub bars: [Option<Bar>; 6],
    /// Its capabilities, without MSI-X.
    pub capabilities: Vec<Capability>,
    /// Whether it has MSI-X.
    pub msix: Option<MsixBar>,
    /// Whether it has an interrupt pin (INTA).
    pub pin: bool,
}

/// A device model behind PCI. Called by any vCPU's thread at any time, so locks are inside; everything is the guest's
/// choice, as for a [`BusDevice`](crate::bus::BusDevice).
pub trait PciFunction: Send + Sync {
    /// What traces and errors call it.
    fn name(&self) -> &str;

    /// What it is. Asked once.
    fn describe(&self) -> Description;

    /// It is in a slot, and these are its interrupts. Called once, before anything below.
    fn attached(&self, pins: &Arc<Pins>);

    /// Fills `data`, 1 to 8 bytes, from `offset` in a BAR.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Takes `data`, 1 to 8 bytes, to `offset` in a BAR.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);

    /// Offsets in a BAR whose writes may be posted, as [`BusDevice::posted`](crate::bus::BusDevice::posted) says.
    fn posted(&self, _bar: usize) -> &[Range] {
        &[]
    }

    /// The BAR answers at this address now, or nowhere. For functions with doorbells.
    fn bar_moved(&self, _bar: usize, _address: Option<u64>) {}

    /// The driver reads configuration space from `offset` on: a function with registers there changes `data`. `config` is
    /// what is there.
    fn read_config(&self, _config: &ConfigSpace, _offset: usize, _data: &mut [u8]) {}

    /// The driver has written configuration space from `offset` on; `config` is what is there now.
    fn config_written(&self, _config: &ConfigSpace, _offset: usize, _data: &[u8]) {}

    /// Back to the state after power-on. Configuration space is reset by the root.
    fn reset(&self);
}

/// Why a function could not be put into a slot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// There is no such slot, or it is taken.
    #[error("{name}: PCI slot {slot} {why}; free are {free}")]
    Slot {
        /// Whose slot it would be.
        name: String,
        /// Which one.
        slot: u8,
        /// What is wrong with it.
        why: &'static str,
        /// The slots that could be taken.
        free: String,
    },
    /// What the function says of itself cannot be.
    #[error("{name}: {what} (PCI 3.0, 6)")]
    Description {
        /// Which function.
        name: String,
        /// What cannot be.
        what: String,
    },
    /// There are not enough addresses for its BARs.
    #[error(
        "{name}: no room for {size:#x} bytes of BAR {bar} in the {window} window; take devices out, or make it larger"
    )]
    Window {
        /// Which function.
        name: String,
        /// Which BAR.
        bar: usize,
        /// Its size.
        size: u64,
        /// Which window.
        window: &'static str,
    },
    /// A saved state is of other functions.
    #[error(
        "the saved PCI bus has {saved} in slot {slot}, this one {own}; give the machine the same devices in the same order"
    )]
    State {
        /// Which slot.
        slot: u8,
        /// What was there.
        saved: String,
        /// What is there.
        own: String,
    },
    /// The engine refused an interrupt.
    #[error("{name}: {what}")]
    Engine {
        /// Which function.
        name: String,
        /// What it said.
        what: String,
    },
}
