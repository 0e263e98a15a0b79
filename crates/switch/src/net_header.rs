//! The virtio-net header that precedes every frame in a virtqueue (virtio 1.2, 5.1.6).

/// `flags`: the checksum at `csum_start + csum_offset` covers only the pseudo-header yet.
pub const NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum has been verified.
pub const DATA_VALID: u8 = 2;

/// `gso_type`: not a segmentation offload.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4, to be cut into segments of `gso_size`.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: UDP over IPv4, to be cut into IP fragments.
pub const GSO_UDP: u8 = 3;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP, to be cut into datagrams of `gso_size`.
pub const GSO_UDP_L4: u8 = 5;
/// `gso_type`, or-ed in: the TCP segment carries CWR.
pub const GSO_ECN: u8 = 0x80;

/// The header, decoded. Offsets count from the first byte of the Ethernet frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_` values, perhaps with [`GSO_ECN`].
    pub gso_type: u8,
    /// A hint: length of the headers that every segment repeats.
    pub hdr_len: u16,
    /// Payload bytes in a segment.
    pub gso_size: u16,
    /// Where checksumming starts.
    pub csum_start: u16,
    /// Where, from `csum_start`, the checksum is stored.
    pub csum_offset: u16,
    /// How many receive buffers the frame takes; with mergeable buffers only, otherwise 1.
    pub num_buffers: u16,
}

impl NetHeader {
    /// Length with mergeable buffers or VIRTIO_F_VERSION_1.
    pub const LEN: usize = 12;
    /// Length in a legacy device without mergeable buffers: no `num_buffers`.
    pub const LEGACY_LEN: usize = 10;

    /// Decodes the header's first eight bytes and the rest, both little-endian.
    #[inline]
    pub fn from_words(low: u64, high: u32) -> NetHeader {
        NetHeader {
            flags: low as u8,
            gso_type: (low >> 8) as u8,
            hdr_len: (low >> 16) as u16,
            gso_size: (low >> 32) as u16,
            csum_start: (low >> 48) as u16,
            csum_offset: high as u16,
            num_buffers: (high >> 16) as u16,
        }
    }

    /// The inverse of [`from_words`](NetHeader::from_words).
    #[inline]
    pub fn to_words(self) -> (u64, u32) {
        let low = u64::from(self.flags)
            | u64::from(self.gso_type) << 8
            | u64::from(self.hdr_len) << 16
            | u64::from(self.gso_size) << 32
            | u64::from(self.csum_start) << 48;
        (low, u32::from(self.csum_offset) | u32::from(self.num_buffers) << 16)
    }

    /// Decodes all twelve bytes.
    pub fn parse(bytes: &[u8; NetHeader::LEN]) -> NetHeader {
        let mut low = [0; 8];
        let mut high = [0; 4];
        low.copy_from_slice(&bytes[..8]);
        high.copy_from_slice(&bytes[8..]);
        NetHeader::from_words(u64::from_le_bytes(low), u32::from_le_bytes(high))
    }

    /// Encodes all twelve bytes.
    pub fn encode(self) -> [u8; NetHeader::LEN] {
        let (low, high) = self.to_words();
        let mut bytes = [0; NetHeader::LEN];
        bytes[..8].copy_from_slice(&low.to_le_bytes());
        bytes[8..].copy_from_slice(&high.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoding_follows_the_layout_of_5_1_6() {
        let header = NetHeader {
            flags: 1,
            gso_type: 4,
            hdr_len: 0x0203,
            gso_size: 0x0405,
            csum_start: 0x0607,
            csum_offset: 0x0809,
            num_buffers: 0x0a0b,
        };
        assert_eq!(header.encode(), [1, 4, 3, 2, 5, 4, 7, 6, 9, 8, 0x0b, 0x0a]);
        assert_eq!(NetHeader::parse(&header.encode()), header);
    }
}
