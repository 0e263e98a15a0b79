//! Guests without a VM: a virtio-net driver and a small TCP/IP stack in this process, over any vhost-user back-end.
//!
//! # Theory of operation
//!
//! ```text
//!   Station: one thread                          Traffic: one thread
//!   tasks: ping, stream, datagrams, services     frames with numbers, times and checksums
//!   Stack: smoltcp                                        |
//!   StackDevice                                           |
//!        |                                                |
//!      Link ---------------- NetDriver -------------------+
//!                            DriverQueue per direction, in a memfd shared with the back-end
//! ```
//!
//! Who negotiates with the back-end (the front-end, in Python) hands over the memory, the queues' places and their
//! eventfds; everything that touches a packet is here. A [`Link`](link::Link) is what the stack needs of a network card,
//! so the stack is tested without any queue, over a [`cable`].

pub mod announce;
pub mod cable;
pub mod checksum;
pub mod content;
pub mod crc;
pub mod device;
pub mod driver;
pub mod features;
pub mod histogram;
pub mod link;
mod sleep;
pub mod stack;
pub mod station;
pub mod tally;
pub mod traffic;
