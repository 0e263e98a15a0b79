//! Virtio transports: how a guest finds a virtio device and negotiates with it.
//!
//! A transport is an in-process vhost front-end. It keeps the registers that a driver writes, owns one eventfd for each
//! direction of each queue, attaches them to the virtual machine as doorbell and as interrupt, and tells the device behind
//! it ([`VirtioBackend`]) what the driver has decided. Buffers never pass through here.

use std::os::fd::RawFd;

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

    /// Fills `data` from the device's configuration space; what lies behind its end reads as zero.
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// Takes a driver's write to configuration space; what may not be written is ignored.
    fn write_config(&self, offset: u32, data: &[u8]);
}
