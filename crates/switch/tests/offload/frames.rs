//! Frames for the offload tests, and an implementation of checksums and header fields that shares nothing with the
//! crate.

use viaduct_switch::net_header::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, NetHeader};

/// What a frame is made of.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub v6: bool,
    pub tcp: bool,
    /// VLAN ids, outermost first.
    pub tags: Vec<u16>,
    /// Bytes of IPv4 options (a multiple of 4) or of IPv6 extension headers (of 8).
    pub extra: usize,
    /// Bytes of TCP options, a multiple of 4.
    pub options: usize,
    pub payload: Vec<u8>,
    pub gso_size: u16,
    pub identification: u16,
    pub sequence: u32,
    pub flags: u8,
}

impl Default for Recipe {
    fn default() -> Recipe {
        Recipe {
            v6: false,
            tcp: true,
            tags: Vec::new(),
            extra: 0,
            options: 12,
            payload: (0..4000u32).map(|i| (i * 7) as u8).collect(),
            gso_size: 1448,
            identification: 0xfffe,
            sequence: 0xffff_ff00,
            flags: 0x18,
        }
    }
}

impl Recipe {
    pub fn protocol(&self) -> u8 {
        if self.tcp { 6 } else { 17 }
    }

    pub fn network(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    pub fn transport(&self) -> usize {
        self.network() + if self.v6 { 40 } else { 20 } + self.extra
    }

    pub fn payload_at(&self) -> usize {
        self.transport() + if self.tcp { 20 + self.options } else { 8 }
    }

    /// The frame as a driver hands it over, with the pseudo-header's sum where the checksum belongs, and its header.
    pub fn frame(&self) -> (Vec<u8>, NetHeader) {
        let mut frame = vec![0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1];
        for tag in &self.tags {
            frame.extend([0x81, 0x00]);
            frame.extend(tag.to_be_bytes());
        }
        frame.extend(if self.v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        let transport_len = self.payload_at() - self.transport() + self.payload.len();
        if self.v6 {
            frame.extend([0x60, 0x01, 0x23, 0x45]);
            frame.extend(((transport_len + self.extra) as u16).to_be_bytes());
            frame.extend([if self.extra == 0 { self.protocol() } else { 60 }, 64]);
            frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xab, 2]);
            if self.extra != 0 {
                // A destination options header with one PadN.
                let pad = self.extra - 4;
                frame.extend([self.protocol(), (self.extra / 8 - 1) as u8, 1, pad as u8]);
                frame.extend(vec![0; pad]);
            }
        } else {
            frame.extend([0x45 + (self.extra / 4) as u8, 0]);
            frame.extend(((20 + self.extra + transport_len) as u16).to_be_bytes());
            frame.extend(self.identification.to_be_bytes());
            frame.extend([0x40, 0, 64, self.protocol(), 0, 0]);
            frame.extend([10, 0, 0, 1, 10, 0, 0xcd, 2]);
            frame.extend(vec![1; self.extra]);
            let checksum = naive_checksum(&frame[self.network()..]);
            let at = self.network() + 10;
            frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        frame.extend([0x9c, 0x41, 0x9c, 0x42]);
        if self.tcp {
            frame.extend(self.sequence.to_be_bytes());
            frame.extend([1, 2, 3, 4, (5 + self.options / 4) as u8 * 16, self.flags, 0x20, 0, 0, 0, 0, 0]);
            frame.extend(vec![1; self.options]);
        } else {
            frame.extend((transport_len as u16).to_be_bytes());
            frame.extend([0, 0]);
        }
        let csum_offset = if self.tcp { 16 } else { 6 };
        let partial = !naive_checksum(&pseudo_header(&frame, self, transport_len));
        let at = self.transport() + csum_offset;
        frame[at..at + 2].copy_from_slice(&partial.to_be_bytes());
        frame.extend(&self.payload);
        let gso_type = match (self.tcp, self.v6) {
            (true, false) => GSO_TCPV4,
            (true, true) => GSO_TCPV6,
            (false, _) => GSO_UDP_L4,
        };
        let header = NetHeader {
            flags: NEEDS_CSUM,
            gso_type: if self.tcp && self.flags & 0x80 != 0 { gso_type | GSO_ECN } else { gso_type },
            // A hint that nobody may rely on: wrong on purpose.
            hdr_len: 1,
            gso_size: self.gso_size,
            csum_start: self.transport() as u16,
            csum_offset: csum_offset as u16,
            num_buffers: 0,
        };
        (frame, header)
    }
}

/// RFC 1071, 4.1, word by word.
pub fn naive_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = 0;
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) * 256 + u64::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = sum % 65536 + sum / 65536;
    }
    !(sum as u16)
}

pub fn pseudo_header(frame: &[u8], recipe: &Recipe, transport_len: usize) -> Vec<u8> {
    let ip = &frame[recipe.network()..];
    let mut pseudo = Vec::new();
    if recipe.v6 {
        pseudo.extend(&ip[8..40]);
        pseudo.extend((transport_len as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, recipe.protocol()]);
    } else {
        pseudo.extend(&ip[12..20]);
        pseudo.extend([0, recipe.protocol()]);
        pseudo.extend((transport_len as u16).to_be_bytes());
    }
    pseudo
}

/// Whether all checksums and lengths of a whole frame, whose headers lie as in `recipe`, are right.
pub fn verify(frame: &[u8], recipe: &Recipe) {
    let ip = &frame[recipe.network()..];
    if recipe.v6 {
        assert_eq!(usize::from(u16::from_be_bytes([ip[4], ip[5]])), ip.len() - 40, "IPv6 payload length");
    } else {
        assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len(), "IPv4 total length");
        assert_eq!(naive_checksum(&ip[..20 + recipe.extra]), 0, "IPv4 header checksum");
    }
    let transport = &frame[recipe.transport()..];
    if !recipe.tcp {
        assert_eq!(usize::from(u16::from_be_bytes([transport[4], transport[5]])), transport.len(), "UDP length");
        assert_ne!(transport[6..8], [0, 0], "UDP checksum missing");
    }
    let mut covered = pseudo_header(frame, recipe, transport.len());
    covered.extend(transport);
    assert_eq!(naive_checksum(&covered), 0, "transport checksum");
}
