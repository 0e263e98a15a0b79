//! Virtqueues (virtio 1.2, sections 2.6 to 2.8).

mod batch;
mod descriptor;
mod device;
mod driver;
mod error;
mod event;
mod inflight;
mod layout;

pub use batch::{Batch, Chain};
pub use device::{DescriptorView, DeviceQueue};
pub use driver::{DriverQueue, Segment};
pub use error::RingError;
pub use inflight::inflight_bytes;
pub use layout::{Layout, MAX_SIZE, PACKED_START, Part, QueueConfig, RingLayout};
