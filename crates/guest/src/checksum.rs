//! The Internet checksum of TCP and UDP over IPv4 and IPv6 (RFC 1071), as far as a virtio-net driver meets it.
//!
//! Two jobs. On the way out, with VIRTIO_NET_F_CSUM, the driver leaves only the pseudo-header's sum in the checksum field
//! and says where it stands; the device completes it, or nobody does as long as the packet stays on one host. On the way
//! in, a frame that is marked neither NEEDS_CSUM nor DATA_VALID was checked by nobody, so the driver does it (virtio 1.2,
//! 5.1.6.4.1).

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Where the transport header of a frame stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    /// First byte of the TCP or UDP header, from the start of the frame.
    pub start: usize,
    /// One past its last payload byte, as the IP header has it (so without Ethernet padding).
    pub end: usize,
    /// Where the checksum stands, from `start`.
    pub offset: usize,
    /// Sum of the pseudo-header, not folded.
    pseudo: u64,
    /// Whether a checksum of zero means that there is none (UDP over IPv4, RFC 768).
    optional: bool,
}

/// Finds the TCP or UDP header of an Ethernet frame. `None`: there is none, it is one of several fragments, or its IP
/// header is malformed.
pub fn transport(frame: &[u8]) -> Option<Transport> {
    match u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?) {
        0x0800 => transport_v4(frame),
        0x86dd => transport_v6(frame),
        _ => None,
    }
}

fn transport_v4(frame: &[u8]) -> Option<Transport> {
    let ip = frame.get(14..)?;
    let header = ip.get(..20)?;
    let start = usize::from(header[0] & 0xf) * 4;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
    if header[0] >> 4 != 4 || start < 20 || total < start || total > ip.len() || fragment != 0 {
        return None;
    }
    let pseudo = sum(&header[12..20]) + u64::from(header[9]) + (total - start) as u64;
    found(header[9], 14 + start, 14 + total, pseudo, true)
}

fn transport_v6(frame: &[u8]) -> Option<Transport> {
    let ip = frame.get(14..)?;
    let header = ip.get(..40)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 || 40 + length > ip.len() {
        return None;
    }
    let pseudo = sum(&header[8..40]) + u64::from(header[6]) + length as u64;
    found(header[6], 54, 54 + length, pseudo, false)
}

fn found(protocol: u8, start: usize, end: usize, pseudo: u64, v4: bool) -> Option<Transport> {
    let (offset, header) = match protocol {
        TCP => (16, 20),
        UDP => (6, 8),
        _ => return None,
    };
    (end - start >= header).then_some(Transport { start, end, offset, pseudo, optional: v4 && protocol == UDP })
}

/// Whether the transport checksum of `frame` is right. A frame without one is right as well.
pub fn verify(frame: &[u8]) -> bool {
    let Some(t) = transport(frame) else { return true };
    let stored = &frame[t.start + t.offset..t.start + t.offset + 2];
    if t.optional && stored == [0, 0] {
        return true;
    }
    fold(t.pseudo + sum(&frame[t.start..t.end])) == 0xffff
}

/// Puts the pseudo-header's sum into the checksum field, as VIRTIO_NET_HDR_F_NEEDS_CSUM asks (virtio 1.2, 5.1.6.2), and
/// returns `csum_start` and `csum_offset`. `None`: the frame has no checksum to complete and is left as it is.
pub fn prepare_partial(frame: &mut [u8]) -> Option<(u16, u16)> {
    let t = transport(frame)?;
    let at = t.start + t.offset;
    frame[at..at + 2].copy_from_slice(&fold(t.pseudo).to_be_bytes());
    Some((u16::try_from(t.start).ok()?, u16::try_from(t.offset).ok()?))
}

/// Completes a checksum that [`prepare_partial`] or a peer began: what a device does for NEEDS_CSUM. `false`: the field
/// does not lie in the frame.
pub fn complete(frame: &mut [u8], csum_start: u16, csum_offset: u16) -> bool {
    let (start, at) = (usize::from(csum_start), usize::from(csum_start) + usize::from(csum_offset));
    if at + 2 > frame.len() {
        return false;
    }
    let value = match !fold(sum(&frame[start..])) {
        // A computed zero is sent as its other name: zero itself would mean "no checksum" for UDP (RFC 768).
        0 => 0xffff,
        value => value,
    };
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
    true
}

/// The ones' complement sum of `bytes` as big-endian 16-bit words, not folded; an odd last byte is padded with zero.
pub fn sum(bytes: &[u8]) -> u64 {
    // 32-bit words into a 64-bit accumulator: the carries collect in the upper half. Byte order does not matter to the
    // sum except for the final swap (RFC 1071, 2 (B)).
    let mut words = bytes.chunks_exact(4);
    let mut total = 0u64;
    for word in &mut words {
        total += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut last = [0u8; 4];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    u64::from(u16::from_be(fold(total)))
}

/// Folds a sum to 16 bits with end-around carry.
pub fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP datagram over IPv4 with a correct checksum, and padding after it.
    fn datagram(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0u8; 42];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[16..18].copy_from_slice(&(28 + payload.len() as u16).to_be_bytes());
        frame[23] = UDP;
        frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        frame[34..42].copy_from_slice(&[0x12, 0x34, 0, 7, 0, 8 + payload.len() as u8, 0, 0]);
        frame.extend_from_slice(payload);
        frame
    }

    #[test]
    fn the_example_of_rfc_1071() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2])), 0xf201);
        assert_eq!(fold(sum(&[])), 0);
    }

    #[test]
    fn partial_then_complete_verifies() {
        for payload in [&b"hello, world"[..], b"odd", b""] {
            let mut frame = datagram(payload);
            let (start, offset) = prepare_partial(&mut frame).expect("a UDP datagram");
            assert_eq!((start, offset), (34, 6));
            assert!(!verify(&frame), "a partial checksum is no checksum");
            assert!(complete(&mut frame, start, offset));
            assert!(verify(&frame));
            frame.extend_from_slice(&[0xaa; 18]);
            assert!(verify(&frame), "padding is not part of the sum");
            frame[30] ^= 1;
            assert!(!verify(&frame), "the pseudo-header is part of the sum");
        }
    }

    #[test]
    fn what_has_no_checksum_is_right() {
        assert!(verify(&datagram(b"zero means none")));
        assert!(verify(&[0; 60]));
        let mut fragment = datagram(b"first of several");
        fragment[20] = 0x20;
        fragment[40] = 1;
        assert!(verify(&fragment));
        let mut lying = datagram(b"total length beyond the frame");
        lying[16..18].copy_from_slice(&9000u16.to_be_bytes());
        assert_eq!(transport(&lying), None);
    }

    #[test]
    fn a_field_outside_the_frame_is_refused() {
        let mut frame = datagram(b"x");
        assert!(!complete(&mut frame, 42, 0));
        assert!(!complete(&mut frame, u16::MAX, u16::MAX));
    }
}
