//! Virtio transports: how a guest finds a virtio device and negotiates with it.
//!
//! A transport is an in-process vhost front-end. It keeps the registers that a driver writes, owns one eventfd for each
//! direction of each queue, attaches them to the virtual machine as doorbell and as interrupt, and tells the device behind
//! it ([`VirtioBackend`]) what the driver has decided. Buffers never pass through here.

pub mod common_configuration;
mod front_end;
pub mod legacy;
pub mod mmio;
pub mod pci;
mod pci_identity;
mod queue_registers;

use std::os::fd::RawFd;

pub use front_end::{FrontEnd, FrontEndState, Interface, Parameters, QueueEvents, StatusChange};
pub use queue_registers::QueueRegisters;

/// Bits of the device status field (virtio 1.2, 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready: queues run.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that only a reset cures.
    pub const DEVICE_NEEDS_RESET: u8 = 0x40;
    /// The guest has given up.
    pub const FAILED: u8 = 0x80;
}

/// Bits of the interrupt status (virtio 1.2, 4.1.4.5 and 4.2.2).
pub mod interrupt {
    /// A queue has used buffers.
    pub const QUEUE: u8 = 1;
    /// The configuration has changed.
    pub const CONFIG: u8 = 2;
}

/// Feature bits that concern a transport (virtio 1.2, 6).
pub mod feature {
    /// The device complies with virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Rings may be packed.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Features of a transport that ours do not have: single-root I/O virtualization (37), data in notifications (38, 39),
    /// reset of single queues (40), an administration queue (41); and two bits that only vhost-user gives a meaning, its
    /// log of written pages (26) and its protocol features (30).
    pub const NOT_OURS: u64 = 1 << 26 | 1 << 30 | 0x1F << 37;
}

/// A queue that the driver has set up and enabled (virtio 1.2, 4.1.5.1.3 and 4.2.3.2). Addresses are guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// Its number.
    pub index: u16,
    /// Descriptors in it: 1 to 32768, a power of two if the ring is split.
    pub size: u16,
    /// Descriptor table or ring.
    pub descriptor: u64,
    /// Available ring, or driver event suppression structure.
    pub driver: u64,
    /// Used ring, or device event suppression structure.
    pub device: u64,
    /// The eventfd that the driver's notification signals; the transport's.
    pub kick: RawFd,
    /// The eventfd that the device signals for a used-buffer notification; the transport's.
    pub call: RawFd,
}

/// What stands behind a transport. Called by vCPU threads; a call may wait for another thread, and returns when what it
/// says has been done.
pub trait VirtioBackend: Send + Sync {
    /// The driver is ready (DRIVER_OK): the queues run from now on, each from its beginning.
    ///
    /// # Errors
    /// What is wrong, for a person: the transport sets DEVICE_NEEDS_RESET (virtio 1.2, 2.1.2) and reports it.
    fn activate(&self, features: u64, queues: &[QueueSetup]) -> Result<(), String>;

    /// The driver resets the device: when this returns, no queue is touched any more (virtio 1.2, 2.4).
    fn reset(&self);

    /// Takes a driver's write to configuration space; what may not be written is ignored. Returns the whole space, if it is
    /// another one now.
    fn write_config(&self, offset: u32, data: &[u8]) -> Option<Vec<u8>>;

    /// The driver broke a rule; `text` says which one, for the machine's log. Said a few times only, however often it
    /// happens.
    fn driver_error(&self, text: &str);
}
