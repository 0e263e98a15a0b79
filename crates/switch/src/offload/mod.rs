//! Offloads completed in software, for receivers that did not negotiate them.
//!
//! # Theory of operation
//!
//! A driver may hand over a frame without its TCP or UDP checksum, or one of up to 64 KiB that is to be cut into
//! segments, and says so in the virtio-net header (virtio 1.2, 5.1.6.2). Where the receiver's driver takes such frames,
//! they pass untouched. Where it does not, [`complete_checksum`] fills the checksum in, and [`segment`] cuts the frame
//! and fills in all checksums of every piece.
//!
//! Both work on a private copy of the frame: what is checked here cannot change before it is used. They are pure
//! functions of frame and header. The header is the guest's word and may lie: each contradiction is an
//! [`OffloadError`], whose [`name`](OffloadError::name) counts it and whose text explains it. `hdr_len` is not used at
//! all, because drivers are known to set it wrongly (a footnote in 5.1.6.2 warns of it); the frame's headers are parsed
//! instead.
//!
//! | `gso_type`        | what happens                                                                       |
//! |-------------------|------------------------------------------------------------------------------------|
//! | `GSO_NONE`        | [`complete_checksum`]                                                              |
//! | `GSO_TCPV4`, `V6` | segments with their own sequence number; FIN and PSH on the last, CWR on the first |
//! | `GSO_UDP_L4`      | datagrams with their own length                                                    |
//! | `GSO_UDP`         | refused: the switch does not offer VIRTIO_NET_F_HOST_UFO, no driver may send it    |

mod checksum;
mod complete;
mod error;
mod headers;
mod segment;

pub use checksum::Sum;
pub use complete::{check, complete_checksum};
pub use error::OffloadError;
pub use headers::MAX_HEADERS;
pub use segment::{MAX_SEGMENTS, Segments, segment};
