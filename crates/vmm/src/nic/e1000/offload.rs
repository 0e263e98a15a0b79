//! What the card does to a frame before it leaves: a VLAN tag, checksums, and the cutting of a long packet into segments
//! (3.3.6 to 3.6). All of it by offsets that the driver gives, in a copy that it cannot change; offsets that point behind
//! the frame's end have no effect.

use serde::{Deserialize, Serialize};
use viaduct_guest::checksum::{fold, sum};

/// A checksum to insert: over the bytes from `start` up to and including `end`, or to the end of the frame where that is
/// zero, into the two bytes at `field`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksum {
    pub start: u8,
    pub field: u8,
    pub end: u16,
}

impl Checksum {
    /// Inserts it. The value that stands in the field before is part of the sum.
    pub fn insert(&self, frame: &mut [u8]) {
        let (start, field) = (usize::from(self.start), usize::from(self.field));
        let end = match usize::from(self.end) {
            0 => frame.len(),
            last => frame.len().min(last + 1),
        };
        if field + 2 <= frame.len() && start < end {
            let value = !fold(sum(&frame[start..end]));
            frame[field..field + 2].copy_from_slice(&value.to_be_bytes());
        }
    }
}

/// What a context descriptor says (3.3.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    pub ip: Checksum,
    pub transport: Checksum,
    pub payload: u32,
    pub header: u8,
    pub segment: u16,
    pub tcp: bool,
    pub ipv4: bool,
}

impl Context {
    pub fn parse(words: [u64; 2]) -> Context {
        let checksum = |bits: u64| Checksum {
            start: (bits & 0xFF) as u8,
            field: (bits >> 8 & 0xFF) as u8,
            end: (bits >> 16 & 0xFFFF) as u16,
        };
        Context {
            ip: checksum(words[0]),
            transport: checksum(words[0] >> 32),
            payload: (words[1] & 0xF_FFFF) as u32,
            header: (words[1] >> 40 & 0xFF) as u8,
            segment: (words[1] >> 48) as u16,
            tcp: words[1] >> 24 & 1 != 0,
            ipv4: words[1] >> 25 & 1 != 0,
        }
    }
}

/// What is to be done to one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    pub ip: bool,
    pub transport: bool,
    pub segment: bool,
    pub tag: Option<u16>,
}

/// Ethernet addresses, in front of which nothing is inserted.
const ADDRESSES: usize = 12;
/// TCP: where sequence number and flags stand, and the flags of the last segment only.
const SEQUENCE: usize = 4;
const FLAGS: usize = 13;
const FIN_AND_PUSH: u8 = 0x09;

/// How many frames a packet becomes; zero if it cannot be cut as its context says.
pub fn frames(packet: &[u8], context: &Context, work: &Work) -> usize {
    if !work.segment {
        return 1;
    }
    let header = usize::from(context.header);
    let (ip, transport) = (usize::from(context.ip.start), usize::from(context.transport.start));
    // Every field that changes from segment to segment lies in the header.
    let fields = ip + if context.ipv4 { 6 } else { 6.max(transport) } <= header
        && transport + if context.tcp { FLAGS + 1 } else { 6 } <= header;
    if context.segment == 0 || header > packet.len() || !fields {
        return 0;
    }
    (packet.len() - header).div_ceil(usize::from(context.segment)).max(1)
}

/// Makes the `index`th of [`frames`] in `frame`.
pub fn frame(packet: &[u8], context: &Context, work: &Work, index: usize, frame: &mut Vec<u8>) {
    frame.clear();
    if work.segment {
        let (header, segment) = (usize::from(context.header), usize::from(context.segment));
        let start = header + index * segment;
        let end = packet.len().min(start + segment);
        frame.extend_from_slice(&packet[..header]);
        frame.extend_from_slice(&packet[start..end]);
        number(frame, context, index, end == packet.len());
    } else {
        frame.extend_from_slice(packet);
    }
    if work.transport {
        context.transport.insert(frame);
    }
    if work.ip {
        context.ip.insert(frame);
    }
}

/// Inserts a VLAN tag (IEEE 802.1Q) behind the addresses.
pub fn tag(frame: &mut Vec<u8>, kind: u16, tag: u16) {
    if frame.len() >= ADDRESSES {
        let [a, b] = kind.to_be_bytes();
        let [c, d] = tag.to_be_bytes();
        frame.splice(ADDRESSES..ADDRESSES, [a, b, c, d]);
    }
}

/// Makes the headers those of segment `index` (3.5.7): lengths, IPv4 identification, sequence number, flags, and the length
/// in the sum of the pseudo-header, which the driver has left out.
fn number(frame: &mut [u8], context: &Context, index: usize, last: bool) {
    let (ip, transport) = (usize::from(context.ip.start), usize::from(context.transport.start));
    let len = frame.len();
    let get = |frame: &[u8], at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    // Frames are shorter than 64 KiB and 256 bytes; what lies beyond 16 bits is the driver's mistake.
    #[allow(clippy::cast_possible_truncation)]
    let put =
        |frame: &mut [u8], at: usize, value: usize| frame[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
    if context.ipv4 {
        put(frame, ip + 2, len - ip);
        let identification = get(frame, ip + 4);
        put(frame, ip + 4, usize::from(identification) + index);
    } else {
        put(frame, ip + 4, len - transport);
    }
    if context.tcp {
        let at = transport + SEQUENCE;
        let sequence = u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
        #[allow(clippy::cast_possible_truncation)]
        let sequence = sequence.wrapping_add((index * usize::from(context.segment)) as u32);
        frame[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
        if !last {
            frame[transport + FLAGS] &= !FIN_AND_PUSH;
        }
    } else {
        put(frame, transport + 4, len - transport);
    }
    let field = usize::from(context.transport.field);
    if field + 2 <= len {
        let pseudo = u64::from(get(frame, field)) + (len - transport) as u64;
        put(frame, field, usize::from(fold(pseudo)));
    }
}

#[cfg(test)]
mod tests {
    use viaduct_guest::checksum::verify;

    use super::*;

    /// What Linux's e1000_tso() leaves to the card: lengths zero, the pseudo-header's sum without a length.
    fn long_packet(payload: &[u8], v4: bool) -> (Vec<u8>, Context) {
        let mut packet = vec![2; 12];
        let ip = 14u8;
        let addresses: Vec<u8>;
        let transport = if v4 {
            packet.extend([8, 0, 0x45, 0, 0, 0, 0xFF, 0xFF, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            addresses = packet[26..34].to_vec();
            34
        } else {
            packet.extend([0x86, 0xDD, 0x60, 0, 0, 0, 0, 0, 6, 64]);
            packet.extend([0xFE; 32]);
            addresses = vec![0xFE; 32];
            54u8
        };
        packet.extend([0, 80, 0, 81, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 0x50, 0x19, 1, 0]);
        packet.extend(fold(sum(&addresses) + 6).to_be_bytes());
        packet.extend([0, 0]);
        let header = packet.len() as u8;
        packet.extend(payload);
        let context = Context {
            ip: Checksum { start: ip, field: ip + 10, end: 33 },
            transport: Checksum { start: transport, field: transport + 16, end: 0 },
            payload: payload.len() as u32,
            header,
            segment: 1000,
            tcp: true,
            ipv4: v4,
        };
        (packet, context)
    }

    #[test]
    fn segments_are_what_the_switch_would_make_of_them() {
        let payload: Vec<u8> = (0..2500u32).map(|n| (n * 7) as u8).collect();
        for v4 in [true, false] {
            let (packet, context) = long_packet(&payload, v4);
            let work = Work { ip: v4, transport: true, segment: true, tag: None };
            assert_eq!(frames(&packet, &context, &work), 3);
            let header = usize::from(context.header);
            let mut received = Vec::new();
            for index in 0..3 {
                let mut made = Vec::new();
                frame(&packet, &context, &work, index, &mut made);
                assert!(verify(&made), "segment {index}");
                if v4 {
                    assert_eq!(fold(sum(&made[14..34])), 0xFFFF, "IPv4 header of segment {index}");
                    assert_eq!(u16::from_be_bytes([made[18], made[19]]), 0xFFFFu16.wrapping_add(index as u16));
                    assert_eq!(usize::from(u16::from_be_bytes([made[16], made[17]])), made.len() - 14);
                } else {
                    assert_eq!(usize::from(u16::from_be_bytes([made[18], made[19]])), made.len() - 54);
                }
                let tcp = usize::from(context.transport.start);
                let sequence = u32::from_be_bytes(made[tcp + 4..tcp + 8].try_into().unwrap());
                assert_eq!(sequence, 0xFFFF_FF00u32.wrapping_add(index as u32 * 1000));
                assert_eq!(made[tcp + 13], if index == 2 { 0x19 } else { 0x10 });
                received.extend_from_slice(&made[header..]);
            }
            assert_eq!(received, payload);
        }
    }

    #[test]
    fn contexts_that_lie_are_refused() {
        let (packet, right) = long_packet(&[0; 3000], true);
        let work = Work { segment: true, transport: true, ip: true, tag: None };
        for wrong in [
            Context { segment: 0, ..right },
            Context { header: 20, ..right },
            Context { transport: Checksum { start: 250, ..right.transport }, ..right },
            Context { ip: Checksum { start: 250, ..right.ip }, ..right },
            Context { ip: Checksum { start: 50, ..right.ip }, ..right },
        ] {
            assert_eq!(frames(&packet, &wrong, &work), 0, "{wrong:?}");
        }
        assert_eq!(frames(&packet[..40], &right, &work), 0);
        assert_eq!(frames(&packet[..54], &right, &work), 1);
    }

    #[test]
    fn checksums_outside_the_frame_have_no_effect() {
        let mut frame = vec![1; 60];
        for (start, field, end) in [(0, 59, 0), (60, 10, 0), (20, 10, 10), (255, 255, 65535)] {
            Checksum { start, field, end }.insert(&mut frame);
            assert_eq!(frame, [1; 60]);
        }
        Checksum { start: 0, field: 58, end: 65535 }.insert(&mut frame);
        assert_eq!(fold(sum(&frame[..58])), !u16::from_be_bytes([frame[58], frame[59]]) - 0x101);
    }

    #[test]
    fn a_tag_stands_behind_the_addresses() {
        let mut frame: Vec<u8> = (0..20).collect();
        tag(&mut frame, 0x8100, 0x2005);
        assert_eq!(frame[10..18], [10, 11, 0x81, 0, 0x20, 5, 12, 13]);
        let mut short = vec![1; 11];
        tag(&mut short, 0x8100, 1);
        assert_eq!(short, [1; 11]);
    }
}
