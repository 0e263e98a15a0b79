//! Why the switch refuses.

use viaduct_ring::RingError;

use crate::mac_table::MAX_PORTS;

/// Why the switch refused something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// No port has this number.
    #[error("there is no port number {0}")]
    NoPort(u16),
    /// The port does not have so many queues.
    #[error("port {port} has no queue {queue}: it has {allowed}, two for each pair (virtio 1.2, 5.1.2)")]
    NoQueue {
        /// The port's name.
        port: String,
        /// The virtqueue asked for.
        queue: u16,
        /// How many it has.
        allowed: usize,
    },
    /// The number of ports is limited.
    #[error("the switch has {MAX_PORTS} ports, the most it can have; remove one first")]
    TooManyPorts,
    /// A ring cannot be used.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A capture file cannot be used.
    #[error("{0}")]
    File(String),
    /// The system refused a descriptor or a thread.
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
}
