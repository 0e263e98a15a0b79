//! The block device (virtio 1.2, 5.2).
//!
//! # Theory of operation
//!
//! Each queue has a thread of its own, the [`worker`], which alone touches the ring. It takes whatever requests are
//! available, checks each ([`request`]), hands it to the disk, and gives back those that the disk has finished: in batches,
//! with one notification for all. Requests finish in any order.
//!
//! A disk is an [`Image`](image::Image). What a raw image is mostly asked for (read, write, flush) goes through io_uring
//! ([`uring`]), straight between the guest's memory and the file. Everything else (other formats, discard, a system without
//! io_uring) is done by a few threads ([`pool`]) that all queues of a device share.
//!
//! # What is durable when
//!
//! A write is in the file when it is acknowledged, with all that a format needs to find it again, so it survives the death of
//! this process: a driver whose front-end connects to the next one does not notice, and would never write it again. It
//! survives the death of the host if the driver flushed afterwards (VIRTIO_BLK_T_FLUSH), or if the cache was in
//! write-through mode: either the driver did not negotiate VIRTIO_BLK_F_FLUSH, or it cleared `writeback` (5.2.6.2).
//!
//! A flush that failed is never followed by one that succeeds, see [`raw`].

mod buffer;
mod device;
mod event;
pub mod image;
mod lock;
mod operation;
mod pool;
mod qcow2;
mod raw;
pub mod request;
mod uring;
mod worker;

pub use buffer::GuestBuffer;
pub use device::{BlockDevice, BlockError, BlockStats};
pub use event::{BlockEvent, EventKind};
pub use image::{Format, Image, OpenError};
pub use operation::Range;
pub use worker::BlockQueue;
