//! The frames: Ethernet, IPv4 and UDP headers, then a stamp of 22 bytes, then filling.
//!
//! ```text
//! 0          14     34    42      46     48        50         56     64
//! | Ethernet | IPv4 | UDP | check | flow | session | sequence | time | filling ...
//! ```
//!
//! Numbers of the stamp are little-endian. `check` is the CRC-32C of the filling, of the stamp behind it and of the
//! frame's length, in this order, so that a sender who keeps the filling computes it from a few bytes. The filling
//! differs from buffer to buffer: what is left over from another frame does not pass for right.

use crate::announce::Mac;
use crate::checksum;
use crate::content;
use crate::crc::Crc32c;

/// Shortest frame: headers and stamp.
pub const SHORTEST: usize = 64;
/// Where the stamp begins.
const STAMP: usize = 42;
/// The stamp without its check.
const CHECKED: std::ops::Range<usize> = STAMP + 4..SHORTEST;

/// UDP port of all frames.
pub const PORT: u16 = 9000;
/// First UDP source port; flows count up from here.
const FIRST_PORT: u16 = 10_000;

/// The headers of one flow.
#[derive(Clone, Copy, Debug)]
pub struct FlowHeaders([u8; STAMP]);

impl FlowHeaders {
    /// Headers of flow `flow` for frames of `len` bytes.
    pub fn new(source: Mac, destination: Mac, flow: u16, len: usize) -> FlowHeaders {
        let mut bytes = [0; STAMP];
        bytes[..6].copy_from_slice(&destination);
        bytes[6..12].copy_from_slice(&source);
        bytes[12..14].copy_from_slice(&[8, 0]);
        let ip = &mut bytes[14..34];
        // Version and length, lengths below 64 KiB, not to be fragmented, a hop limit, UDP.
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((len - 14) as u16).to_be_bytes());
        ip[6] = 0x40;
        ip[8] = 64;
        ip[9] = 17;
        // Addresses for benchmarks (RFC 2544, appendix C.2.2).
        let [high, low] = flow.to_be_bytes();
        ip[12..16].copy_from_slice(&[198, 18, high, low]);
        ip[16..20].copy_from_slice(&[198, 19, high, low]);
        let sum = !checksum::fold(checksum::sum(ip));
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let udp = &mut bytes[34..42];
        udp[..2].copy_from_slice(&FIRST_PORT.wrapping_add(flow).to_be_bytes());
        udp[2..4].copy_from_slice(&PORT.to_be_bytes());
        udp[4..6].copy_from_slice(&((len - 34) as u16).to_be_bytes());
        // No UDP checksum (RFC 768): the stamp has a better one.
        FlowHeaders(bytes)
    }
}

/// The stamp's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Which of the sender's flows.
    pub flow: u16,
    /// Which sender.
    pub session: u16,
    /// Counts up by one within a flow; 48 bits.
    pub sequence: u64,
    /// When the frame was sent, on the monotonic clock.
    pub time: u64,
}

/// The filling of a frame of `len` bytes, and the checksum of it that [`write`] goes on from.
pub fn filling(seed: u64, len: usize) -> (Vec<u8>, Crc32c) {
    let mut bytes = vec![0; len - SHORTEST];
    content::fill(seed, 8, &mut bytes);
    let crc = Crc32c::default().update(&bytes);
    (bytes, crc)
}

/// The first 64 bytes of a frame of `len` bytes whose filling has the checksum `filling`.
#[inline]
pub fn write(headers: &FlowHeaders, stamp: &Stamp, filling: Crc32c, len: u32) -> [u8; SHORTEST] {
    let mut bytes = [0; SHORTEST];
    bytes[..STAMP].copy_from_slice(&headers.0);
    bytes[46..48].copy_from_slice(&stamp.flow.to_le_bytes());
    bytes[48..50].copy_from_slice(&stamp.session.to_le_bytes());
    bytes[50..56].copy_from_slice(&stamp.sequence.to_le_bytes()[..6]);
    bytes[56..64].copy_from_slice(&stamp.time.to_le_bytes());
    let check = filling.update(&bytes[CHECKED]).update(&len.to_le_bytes()).finish();
    bytes[42..46].copy_from_slice(&check.to_le_bytes());
    bytes
}

/// Whether a frame that begins with these bytes claims to be one of ours.
#[inline]
pub fn is_ours(head: &[u8; SHORTEST]) -> bool {
    head[12..14] == [8, 0] && head[14] == 0x45 && head[23] == 17 && head[36..38] == PORT.to_be_bytes()
}

/// The stamp of a frame of `len` bytes that begins with `head` and whose filling has the checksum `filling`, and whether
/// its check is right.
#[inline]
pub fn read(head: &[u8; SHORTEST], filling: Crc32c, len: u32) -> (Stamp, bool) {
    let number = |range: std::ops::Range<usize>| {
        head[range].iter().rev().fold(0u64, |number, &byte| number << 8 | u64::from(byte))
    };
    let stamp = Stamp {
        flow: number(46..48) as u16,
        session: number(48..50) as u16,
        sequence: number(50..56),
        time: number(56..64),
    };
    let check = filling.update(&head[CHECKED]).update(&len.to_le_bytes()).finish();
    (stamp, u64::from(check) == number(42..46))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_comes_back() {
        for len in [64, 65, 128, 1514] {
            let headers = FlowHeaders::new([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], 7, len);
            let (bytes, crc) = filling(3, len);
            let stamp = Stamp { flow: 7, session: 0xabcd, sequence: 0x1234_5678_9abc, time: u64::MAX - 1 };
            let head = write(&headers, &stamp, crc, len as u32);
            assert!(is_ours(&head));
            let received = Crc32c::default().update(&bytes);
            assert_eq!(read(&head, received, len as u32), (stamp, true));
            assert!(!read(&head, received, len as u32 + 1).1, "another length");
            let mut changed = head;
            changed[50] ^= 1;
            assert!(!read(&changed, received, len as u32).1, "another number");
            if len > 64 {
                let (_, other) = filling(4, len);
                assert!(!read(&head, other, len as u32).1, "the filling of another buffer");
            }
        }
    }

    #[test]
    fn headers_are_good() {
        let headers = FlowHeaders::new([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], 300, 1514);
        assert_eq!(checksum::fold(checksum::sum(&headers.0[14..34])), 0xffff);
        let mut frame = headers.0.to_vec();
        frame.resize(1514, 0);
        let transport = checksum::transport(&frame).expect("UDP");
        assert_eq!((transport.start, transport.end), (34, 1514));
        assert!(checksum::verify(&frame));
    }
}
