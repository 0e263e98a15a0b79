//! Traffic for measurements: frames with numbers, times and checksums, sent and judged without any TCP/IP stack.
//!
//! # Theory of operation
//!
//! A [`Source`] fills transmit buffers with frames once; for each frame that leaves it rewrites the first 64 bytes (the
//! flow's headers and the [stamp](stamp)) and nothing else. A [`Sink`] reads the stamp of each frame, keeps account of
//! every flow's numbers, and checks the content. Both work in batches of 32, read the clock once for each, kick the
//! device only if it asks, and make no system call as long as there is work.
//!
//! Each runs as the [`Job`] of an [`Engine`], a thread that survives the loss of the link as a station does.

mod engine;
mod pace;
mod sink;
mod source;
pub mod stamp;

pub use engine::{Engine, EngineEvent, Job};
pub use sink::{Sink, SinkConfig, SinkReport};
pub use source::{Source, SourceConfig, SourceError, SourceReport};

/// Frames handled together.
const BATCH: usize = 32;

/// Nanoseconds of the system's monotonic clock: the same in all processes, so that one stamps and another measures.
#[inline]
pub(crate) fn monotonic() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the structure it is given; this clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}
