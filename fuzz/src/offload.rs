//! Checksums and segmentation completed for frames and headers of any kind. Segments are judged by the guest's own
//! checksum code, which shares nothing with the switch's.

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_guest::checksum;
use viaduct_switch::net_header::{GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, NetHeader};
use viaduct_switch::offload::{MAX_HEADERS, MAX_SEGMENTS, check, complete_checksum, segment};

/// Headers of a TCP or UDP packet that are right but for what the input changes.
fn frame(u: &mut Unstructured, header: &mut NetHeader) -> Result<Vec<u8>> {
    let (v6, tcp, tags) = (u.arbitrary()?, u.arbitrary()?, u.int_in_range(0..=3u8)?);
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for _ in 0..tags {
        frame.extend([0x81, 0, 0, 5]);
    }
    let protocol = if tcp { 6 } else { 17 };
    if v6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, protocol, 64]);
        frame.extend([0xfd; 32]);
    } else {
        frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    header.csum_start = frame.len() as u16;
    header.csum_offset = if tcp { 16 } else { 6 };
    header.flags = NEEDS_CSUM;
    header.gso_type = match (v6, tcp) {
        (false, true) => GSO_TCPV4,
        (true, true) => GSO_TCPV6,
        _ => GSO_UDP_L4,
    };
    header.gso_size = u.int_in_range(1..=2000)?;
    let transport = frame.len();
    frame.resize(transport + if tcp { 20 } else { 8 }, 0);
    if tcp {
        frame[transport + 12] = 0x50;
    }
    for _ in 0..u.int_in_range(0..=3u8)? {
        let at = u.int_in_range(0..=frame.len() - 1)?;
        frame[at] = u.arbitrary()?;
    }
    Ok(frame)
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let mut header = NetHeader::default();
    let mut frame = if u.arbitrary()? { frame(u, &mut header)? } else { Vec::new() };
    if frame.is_empty() || u.int_in_range(0..=3u8)? == 0 {
        header = NetHeader::parse(&u.arbitrary()?);
    }
    let repeat = u.int_in_range(0..=20_000usize)?;
    frame.extend_from_slice(u.take_rest_of());
    // Long payloads from short inputs.
    let start = frame.len();
    frame.extend((0..repeat).map(|at| (at * 7 + start) as u8));
    judge(&frame, &header);
    Ok(())
}

trait Rest<'a> {
    fn take_rest_of(&mut self) -> &'a [u8];
}

impl<'a> Rest<'a> for Unstructured<'a> {
    fn take_rest_of(&mut self) -> &'a [u8] {
        self.bytes(self.len()).unwrap_or_default()
    }
}

fn judge(frame: &[u8], header: &NetHeader) {
    assert_eq!(NetHeader::parse(&header.encode()), *header);
    let allowed = check(header, frame.len());
    let mut copy = frame.to_vec();
    let mut after = *header;
    match complete_checksum(&mut copy, &mut after) {
        Ok(()) => assert_eq!(after.flags & NEEDS_CSUM, 0),
        Err(_) => assert!(copy == frame && after == *header && allowed.is_err()),
    }
    assert_eq!(copy.len(), frame.len());
    let mut payloads = Vec::new();
    let mut made = 0;
    let mut headers_len = 0;
    let result = segment(frame, header, |headers, payload| {
        made += 1;
        headers_len = headers.len();
        assert!(headers.len() <= MAX_HEADERS && payload.len() <= usize::from(header.gso_size));
        payloads.extend_from_slice(payload);
        let whole = [headers, payload].concat();
        // Behind VLAN tags the guest's code does not look.
        assert!(checksum::verify(&whole), "segment {made} has a wrong checksum: {whole:02x?}");
    });
    match result {
        Ok(()) => {
            assert!((1..=MAX_SEGMENTS).contains(&made));
            assert_eq!(payloads, frame[headers_len..], "the segments carry the payload");
            assert!(allowed.is_ok() && header.gso_type != GSO_NONE);
        }
        Err(_) => assert_eq!(made, 0, "a refused frame leaves nothing"),
    }
}
