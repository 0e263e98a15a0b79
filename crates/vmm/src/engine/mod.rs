//! What everything above an engine may know of it.
//!
//! An engine gives a machine memory, interrupts and doorbells ([`Vm`]) and processors ([`Vcpu`]). KVM is one; a software
//! CPU can be another, because nothing here speaks of how the guest's instructions are executed.

pub mod ioapic;
pub mod kvm;
mod posted;
mod registers;
mod vcpu;

use std::sync::Arc;

use serde_json::Value;
use viaduct_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

pub use posted::{PostedWrite, Posting, Space};
pub use registers::{NAMES, Registers, Segment, Table};
pub use vcpu::{Debug, Exit, Kick, Vcpu, Vectors};

/// Why an engine refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The host's kernel did.
    #[error("{what}: {source}")]
    System {
        /// What was asked of it, with its values.
        what: String,
        /// Its answer.
        source: std::io::Error,
    },
    /// The engine cannot do it, on this host or at all.
    #[error("{0}")]
    Unsupported(String),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl EngineError {
    /// The host's kernel refused `what`.
    pub fn system(what: impl Into<String>, source: impl Into<std::io::Error>) -> EngineError {
        EngineError::System { what: what.into(), source: source.into() }
    }
}

/// Where the guest's interrupt controllers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// All in the engine: local APICs, IOAPIC, PICs, and the interval timer.
    Engine,
    /// The local APICs in the engine, the IOAPIC in this process; no PICs.
    Split,
    /// There are none.
    None,
}

/// Pages of one region of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    /// The guest-physical address of the region.
    pub base: u64,
    /// A bit for each page of 4096 bytes, the lowest first.
    pub bitmap: Vec<u64>,
}

impl DirtyPages {
    /// The guest-physical address of each page.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        let words = (self.base..).step_by(64 * 4096).zip(&self.bitmap);
        words.flat_map(|(first, word)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| first + bit * 4096)
        })
    }
}

/// What an engine gives for a machine.
pub struct Parts {
    /// The machine without processors.
    pub vm: Arc<dyn OwnedVm>,
    /// Its processors by number.
    pub vcpus: Vec<Box<dyn Vcpu>>,
}

/// A message-signalled interrupt: a write of `data` to `address` (PCI 3.0, 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Where a device writes to.
    pub address: u64,
    /// What it writes.
    pub data: u32,
}

/// A write of the guest that only wakes somebody: the vCPU goes on at once, without an exit to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// A write to a port: of any width and value, or of `value`'s 16 bits only.
    Port {
        /// The port.
        port: u16,
        /// The 16-bit value that rings; `None`: every write does.
        value: Option<u16>,
    },
    /// A write to an address: of any width and value, or of `value`'s 32 bits only.
    Address {
        /// The guest-physical address.
        address: u64,
        /// The 32-bit value that rings; `None`: every write does.
        value: Option<u32>,
    },
}

/// Something attached to a virtual machine that is detached when this is dropped.
pub trait Attachment: Send + Sync {}

/// An event whose message can be changed, as a driver does by writing an MSI-X table entry. Dropping it detaches the event.
pub trait MsiRoute: Send + Sync {
    /// From now on the event sends `msi`; `None`: nothing, it stays pending in the event.
    ///
    /// # Errors
    /// [`EngineError`]: the message is the old one.
    fn set(&self, msi: Option<Msi>) -> Result<(), EngineError>;
}

/// A virtual machine as its devices see it. Any thread may call.
pub trait Vm: Send + Sync {
    /// Drives the input pin `gsi` of the interrupt controllers.
    ///
    /// # Errors
    /// [`EngineError`], if there is no such pin.
    fn set_line(&self, gsi: u32, level: bool) -> Result<(), EngineError>;

    /// Sends one message.
    ///
    /// # Errors
    /// [`EngineError`], if there is nobody who receives messages.
    fn signal_msi(&self, msi: Msi) -> Result<(), EngineError>;

    /// From now on each signal of `event` is a short pulse of the pin `gsi`.
    ///
    /// # Errors
    /// [`EngineError`].
    fn attach_line(&self, gsi: u32, event: &EventFd) -> Result<Box<dyn Attachment>, EngineError>;

    /// From now on each signal of `event` is a message, as soon as one is set.
    ///
    /// # Errors
    /// [`EngineError`], if there are no more routes.
    fn attach_msi(&self, event: &EventFd) -> Result<Box<dyn MsiRoute>, EngineError>;

    /// From now on a write of the guest to `doorbell` signals `event`, and reaches no bus.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] if this engine has no doorbells: then the write arrives on the bus, and its device
    /// signals the event itself.
    fn attach_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<Box<dyn Attachment>, EngineError>;

    /// From now on writes of the guest in there may be posted: its processor goes on at once, and they reach the bus before
    /// any exit that comes after them ([`OwnedVm::take_posted`]).
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] if this engine cannot: then each of them is an exit.
    fn post_writes(&self, _posting: Posting) -> Result<Box<dyn Attachment>, EngineError> {
        Err(EngineError::Unsupported("this engine posts no writes".into()))
    }
}

/// A virtual machine as its owner sees it.
pub trait OwnedVm: Vm {
    /// Devices that the engine brings along, for the bus of addresses: first address, bytes, device.
    fn devices(&self) -> Vec<(u64, u64, Arc<dyn BusDevice>)>;

    /// From now on it is noted which pages of memory the guest writes, or no longer; devices have logs of their own.
    ///
    /// # Errors
    /// [`EngineError`].
    fn log_dirty_pages(&self, on: bool) -> Result<(), EngineError>;

    /// The pages that the guest has written since it was last asked, by region. Those of the last moment are in it only if
    /// no processor runs.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] if nothing is noted.
    fn take_dirty_pages(&self) -> Result<Vec<DirtyPages>, EngineError>;

    /// Gives `deliver` the posted writes, in the order in which they were made. A vCPU that has left the guest calls it before
    /// its exit is answered: when it returns, all writes that this vCPU has posted have been delivered.
    fn take_posted(&self, _deliver: &mut dyn FnMut(&PostedWrite)) {}

    /// A vCPU has ended the level-triggered interrupt of this vector ([`Exit::EndOfInterrupt`]).
    fn end_of_interrupt(&self, vector: u8);

    /// What is no processor's: interrupt controllers and clocks. Call it while no processor runs.
    ///
    /// # Errors
    /// [`EngineError`].
    fn save(&self) -> Result<Value, EngineError>;

    /// Puts back what was saved by a machine made alike. Call it while no processor runs.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] if it is no such thing; [`EngineError`] if this host cannot be like the one before.
    fn restore(&self, state: &Value) -> Result<(), EngineError>;

    /// What a new machine made alike would be saved as: its own state, and each processor's.
    ///
    /// # Errors
    /// [`EngineError`].
    fn power_on_state(&self) -> Result<(Value, Vec<Value>), EngineError>;

    /// From now on the guest's physical memory is `memory`. Regions that were there before keep their contents and may be
    /// in use by running processors.
    ///
    /// # Errors
    /// [`EngineError`]: the memory is the old one.
    fn set_memory(&self, memory: &GuestMemory) -> Result<(), EngineError>;
}
