//! Virtqueues (virtio 1.2, sections 2.6 to 2.8).

mod batch;
mod device;

pub use batch::{Batch, Chain};
pub use device::{DeviceQueue, Layout, QueueConfig, RingError};
