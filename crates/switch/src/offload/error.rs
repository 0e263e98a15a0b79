//! Why an offload cannot be completed.

use super::{MAX_HEADERS, MAX_SEGMENTS};

/// What is wrong with a frame or with the virtio-net header before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OffloadError {
    /// The frame ends before its headers do.
    #[error("the frame has {found} bytes but its {what} ends at {needed}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Bytes needed for it.
        needed: usize,
        /// Bytes in the frame.
        found: usize,
    },
    /// The checksum would not lie in the frame, behind the Ethernet header.
    #[error(
        "csum_start {start} and csum_offset {offset} are not in the frame: start may be 14 or more, and the two bytes at \
         their sum must lie in its {len} bytes (virtio 1.2, 5.1.6.2.1)"
    )]
    ChecksumPlace {
        /// `csum_start`.
        start: u16,
        /// `csum_offset`.
        offset: u16,
        /// Bytes in the frame.
        len: usize,
    },
    /// The place given for the checksum is not where the frame's headers have it.
    #[error(
        "csum_start {start} and csum_offset {offset} differ from {real_start} and {real_offset}, which the frame's headers \
         give (virtio 1.2, 5.1.6.2.1)"
    )]
    ChecksumMismatch {
        /// `csum_start`.
        start: u16,
        /// `csum_offset`.
        offset: u16,
        /// Where the transport header begins.
        real_start: usize,
        /// Where its checksum is.
        real_offset: usize,
    },
    /// A segmentation offload without a checksum to be completed.
    #[error("gso_type {0:#x} without NEEDS_CSUM in flags (virtio 1.2, 5.1.6.2.1)")]
    NotPartial(u8),
    /// No such segmentation offload.
    #[error("gso_type {0:#x} is not one of 0, 1, 4 (with 0x80 for ECN or without) and 5 (virtio 1.2, 5.1.6)")]
    UnknownGso(u8),
    /// IP fragmentation, which is never offered.
    #[error("gso_type 3 asks for IP fragmentation, but VIRTIO_NET_F_HOST_UFO was not offered (virtio 1.2, 5.1.6.2.1)")]
    Fragmentation,
    /// Segments without payload.
    #[error("gso_size is 0 with gso_type {0:#x}; at least 1 is allowed (virtio 1.2, 5.1.6.2.1)")]
    ZeroSize(u8),
    /// The frame would become too many segments.
    #[error("gso_size {size} makes {found} segments of this frame; {MAX_SEGMENTS} are allowed")]
    TooManySegments {
        /// `gso_size`.
        size: u16,
        /// Segments it would make.
        found: usize,
    },
    /// A segment would not fit into an IP packet.
    #[error("gso_size makes an IP packet of length {found}; 65535 is allowed (RFC 791, 3.1; RFC 8200, 3)")]
    SegmentTooLong {
        /// What its length field would have to hold.
        found: usize,
    },
    /// The frame does not carry the IP version that `gso_type` says.
    #[error("gso_type {gso_type:#x} but the frame's EtherType is {ethertype:#06x} (virtio 1.2, 5.1.6.2)")]
    WrongNetwork {
        /// `gso_type`.
        gso_type: u8,
        /// Behind VLAN tags.
        ethertype: u16,
    },
    /// The packet does not carry the transport protocol that `gso_type` says.
    #[error("gso_type {gso_type:#x} but the packet's protocol is {protocol} (virtio 1.2, 5.1.6.2)")]
    WrongTransport {
        /// `gso_type`.
        gso_type: u8,
        /// IPv4 protocol, or IPv6 next header behind the extension headers.
        protocol: u8,
    },
    /// A header field has a value that cannot be.
    #[error("the frame's {what} is {found}; at least {least} is allowed")]
    BadHeader {
        /// Which field.
        what: &'static str,
        /// Its value.
        found: usize,
        /// Smallest value allowed.
        least: usize,
    },
    /// The first nibble of the packet contradicts the EtherType.
    #[error("the packet's IP version is {found}; its EtherType says {expected}")]
    WrongVersion {
        /// In the packet.
        found: u8,
        /// By the EtherType.
        expected: u8,
    },
    /// A fragment cannot be segmented.
    #[error("the packet is a fragment; only a whole one can be segmented (RFC 791, 3.2; RFC 8200, 4.5)")]
    Fragment,
    /// The checksum covers an address that is not in the IPv6 header.
    #[error("the packet's routing header has {0} segments left; only 0 can be segmented (RFC 8200, 8.1)")]
    RoutingHeader(u8),
    /// The headers are longer than any real ones.
    #[error("the frame's headers have {0} bytes; {MAX_HEADERS} are allowed")]
    HeadersTooLong(usize),
}

impl OffloadError {
    /// A short name of the reason, for a counter.
    pub fn name(&self) -> &'static str {
        match self {
            OffloadError::Truncated { .. } => "truncated",
            OffloadError::ChecksumPlace { .. } => "checksum_place",
            OffloadError::ChecksumMismatch { .. } => "checksum_mismatch",
            OffloadError::NotPartial(_) => "not_partial",
            OffloadError::UnknownGso(_) => "unknown_gso",
            OffloadError::Fragmentation => "fragmentation",
            OffloadError::ZeroSize(_) => "zero_size",
            OffloadError::TooManySegments { .. } => "too_many_segments",
            OffloadError::SegmentTooLong { .. } => "segment_too_long",
            OffloadError::WrongNetwork { .. } => "wrong_network",
            OffloadError::WrongTransport { .. } => "wrong_transport",
            OffloadError::BadHeader { .. } => "bad_header",
            OffloadError::WrongVersion { .. } => "wrong_version",
            OffloadError::Fragment => "fragment",
            OffloadError::RoutingHeader(_) => "routing_header",
            OffloadError::HeadersTooLong(_) => "headers_too_long",
        }
    }
}
