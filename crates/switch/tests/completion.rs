//! A receiver that accepts no offloads gets finished frames, whatever the sender left to do.

mod station;

use station::{BROADCAST, Options, Station, mac, stats, switch};
use viaduct_switch::Offloads;
use viaduct_switch::counters::DropReason;
use viaduct_switch::net_header::{GSO_TCPV4, NEEDS_CSUM, NetHeader};

/// The plain internet checksum (RFC 1071).
fn sum(bytes: &[u8], initial: u32) -> u16 {
    let mut sum = initial;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn pseudo_header(packet: &[u8]) -> u32 {
    let tcp_len = packet.len() as u32 - 20;
    (u32::from(sum(&packet[12..20], 0)) + 6 + tcp_len) & 0x1_ffff
}

/// TCP over IPv4 with a partial checksum: the pseudo-header's.
fn tcp_frame(payload: &[u8]) -> Vec<u8> {
    let total = (40 + payload.len()) as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let checksum = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut tcp = vec![0x1f, 0x90, 0x00, 0x50, 0, 0, 0x10, 0, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0];
    tcp.extend_from_slice(payload);
    let mut packet = [ip, tcp].concat();
    let partial = sum(&[], pseudo_header(&packet));
    packet[36..38].copy_from_slice(&partial.to_be_bytes());
    [&BROADCAST[..], &mac(1), &[8, 0], &packet].concat()
}

fn assert_finished(frame: &[u8]) {
    let packet = &frame[14..];
    assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len(), "the IP length");
    assert_eq!(sum(&packet[..20], 0), 0xffff, "the IP checksum");
    assert_eq!(sum(&packet[20..], pseudo_header(packet)), 0xffff, "the TCP checksum");
}

const CSUM: NetHeader = NetHeader {
    flags: NEEDS_CSUM,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 16,
    num_buffers: 0,
};

#[test]
fn offloads_pass_untouched_where_they_are_accepted() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options { accepts: Offloads::CSUM | Offloads::TSO4, ..Options::default() });
    let payload: Vec<u8> = (0..60_000u32).map(|n| (n * 7) as u8).collect();
    let header = NetHeader { gso_type: GSO_TCPV4, gso_size: 1448, hdr_len: 54, ..CSUM };
    let sent = tcp_frame(&payload);
    a.send_in_pieces(header, &sent, &[12, 66, 20000, 20000]);
    let (received, bytes) = b.receive().expect("a frame arrives");
    assert!(bytes == sent, "64 KB cross as one frame");
    assert_eq!(received, NetHeader { num_buffers: 30, ..header });
}

#[test]
fn checksums_and_segments_are_completed_where_they_are_not() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut plain = Station::plug(&switch, Options::default());
    let mut small = Station::plug(&switch, Options { mergeable: false, buffer: 1600, ..Options::default() });
    a.send_in_pieces(CSUM, &tcp_frame(b"hello, world"), &[]);
    for station in [&mut plain, &mut small] {
        let (header, bytes) = station.receive().expect("a frame arrives");
        assert_eq!((header.flags, bytes.len()), (0, 66));
        assert_finished(&bytes);
    }
    let payload: Vec<u8> = (0..50_001u32).map(|n| (n * 13 / 7) as u8).collect();
    let header = NetHeader { gso_type: GSO_TCPV4, gso_size: 1448, hdr_len: 54, ..CSUM };
    a.send_in_pieces(header, &tcp_frame(&payload), &[12, 100]);
    for station in [&mut plain, &mut small] {
        let mut joined = Vec::new();
        while joined.len() < payload.len() {
            let (header, bytes) = station.receive().expect("a segment arrives");
            assert_eq!((header.flags, header.gso_type), (0, 0));
            assert!(bytes.len() <= 54 + 1448);
            assert_finished(&bytes);
            let sequence = u32::from_be_bytes([bytes[38], bytes[39], bytes[40], bytes[41]]);
            assert_eq!(sequence as usize, 0x1000 + joined.len());
            joined.extend_from_slice(&bytes[54..]);
        }
        assert!(joined == payload, "the segments carry the payload");
    }
    assert_eq!(stats(&switch, plain.port).sent[0].completed_offloads, 2);
}

#[test]
fn a_frame_that_is_not_what_its_header_says_is_dropped_and_counted() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let b = Station::plug(&switch, Options::default());
    let mut udp = tcp_frame(&[0; 3000]);
    udp[23] = 17;
    a.send_in_pieces(NetHeader { gso_type: GSO_TCPV4, gso_size: 1000, ..CSUM }, &udp, &[]);
    a.send_in_pieces(NetHeader { gso_type: GSO_TCPV4, gso_size: 1000, ..CSUM }, &tcp_frame(&[])[..40], &[]);
    a.reclaim();
    let drops = &stats(&switch, b.port).sent[0].drops;
    let from = &stats(&switch, a.port).received[0].drops;
    assert_eq!(drops[DropReason::Offload as usize] + from[DropReason::BadHeader as usize], 2);
}
