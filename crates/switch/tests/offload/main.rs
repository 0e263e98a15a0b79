//! Checksums completed and frames segmented, checked by an implementation that shares nothing with the crate's.

mod frames;
mod tshark;

use frames::{Recipe, verify};
use proptest::prelude::*;
use viaduct_switch::net_header::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, NEEDS_CSUM, NetHeader};
use viaduct_switch::offload::{MAX_SEGMENTS, OffloadError, Segments, check, complete_checksum, segment};

fn segments(frame: &[u8], header: &NetHeader) -> Result<Vec<Vec<u8>>, OffloadError> {
    let mut segments = Vec::new();
    segment(frame, header, |headers, payload| segments.push([headers, payload].concat()))?;
    Ok(segments)
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let shape = (any::<bool>(), any::<bool>(), prop::collection::vec(0u16..4096, 0..3), 0usize..6, 0usize..11);
    let content = (prop::collection::vec(any::<u8>(), 0..9000), 9u16..3000, any::<u16>(), any::<u32>(), any::<u8>());
    (shape, content).prop_map(
        |((v6, tcp, tags, extra, options), (payload, gso_size, identification, sequence, flags))| Recipe {
            v6,
            tcp,
            tags,
            extra: extra * if v6 { 8 } else { 4 },
            options: options * 4,
            payload,
            gso_size,
            identification,
            sequence,
            flags,
        },
    )
}

/// Everything that a segment is: the original where it may not differ, and right where it must.
fn assert_segments(recipe: &Recipe, frame: &[u8], segments: &[Vec<u8>]) {
    let size = usize::from(recipe.gso_size);
    assert_eq!(segments.len(), recipe.payload.len().div_ceil(size).max(1));
    let mut payload: Vec<u8> = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        verify(segment, recipe);
        let (first, last) = (index == 0, index + 1 == segments.len());
        let here = &segment[recipe.payload_at()..];
        if !last {
            assert_eq!(here.len(), size);
        }
        let mut expected = frame[..recipe.payload_at()].to_vec();
        let network = recipe.network();
        // What verify has looked at is taken over, the rest is the frame's or computed here.
        let mut take = |range: std::ops::Range<usize>| expected[range.clone()].copy_from_slice(&segment[range]);
        if recipe.v6 {
            take(network + 4..network + 6);
        } else {
            take(network + 2..network + 4);
            take(network + 10..network + 12);
            let identification = recipe.identification.wrapping_add(index as u16);
            expected[network + 4..network + 6].copy_from_slice(&identification.to_be_bytes());
        }
        let transport = recipe.transport();
        if recipe.tcp {
            expected[transport + 16..transport + 18].copy_from_slice(&segment[transport + 16..transport + 18]);
            let sequence = recipe.sequence.wrapping_add(payload.len() as u32);
            expected[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
            let mut flags = recipe.flags;
            if !first {
                flags &= !0x80;
            }
            if !last {
                flags &= !0x09;
            }
            expected[transport + 13] = flags;
        } else {
            expected[transport + 4..transport + 8].copy_from_slice(&segment[transport + 4..transport + 8]);
        }
        assert_eq!(segment[..recipe.payload_at()], expected, "headers of segment {index}");
        payload.extend(here);
    }
    assert_eq!(payload, recipe.payload);
}

proptest! {
    #[test]
    fn segments_are_the_frame_again(recipe in recipe()) {
        let (frame, header) = recipe.frame();
        let made = segments(&frame, &header).unwrap();
        assert_segments(&recipe, &frame, &made);
        let counted = Segments::new(&frame, &header).unwrap();
        prop_assert_eq!(counted.count(), made.len());
        prop_assert_eq!(counted.headers_len(), recipe.payload_at());
    }

    #[test]
    fn completed_checksum_is_right(recipe in recipe()) {
        let (mut frame, header) = recipe.frame();
        let mut header = NetHeader { gso_type: GSO_NONE, gso_size: 0, ..header };
        prop_assert_eq!(check(&header, frame.len()), Ok(()));
        complete_checksum(&mut frame, &mut header).unwrap();
        verify(&frame, &recipe);
        prop_assert_eq!(header, NetHeader { hdr_len: header.hdr_len, ..NetHeader::default() });
        // Nothing is left to do.
        let before = frame.clone();
        complete_checksum(&mut frame, &mut header).unwrap();
        prop_assert_eq!(frame, before);
    }

    #[test]
    fn any_bytes_are_survived(frame in prop::collection::vec(any::<u8>(), 0..200), low: u64, high: u32) {
        let mut header = NetHeader::from_words(low, high);
        survive(&frame, &mut header);
    }

    /// Frames that are nearly right get further in.
    #[test]
    fn any_damage_is_survived(
        recipe in recipe(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        whole: bool,
        lies in (any::<[Option<u16>; 3]>(), any::<Option<u8>>(), any::<Option<u8>>()),
    ) {
        let (mut frame, mut header) = recipe.frame();
        let headers = recipe.payload_at();
        for (at, byte) in damage {
            frame[at.index(headers)] = byte;
        }
        if !whole {
            frame.truncate(cut.index(frame.len() + 1));
        }
        let ([start, offset, size], gso_type, flags) = lies;
        header.csum_start = start.unwrap_or(header.csum_start);
        header.csum_offset = offset.unwrap_or(header.csum_offset);
        header.gso_size = size.unwrap_or(header.gso_size);
        header.gso_type = gso_type.unwrap_or(header.gso_type);
        header.flags = flags.unwrap_or(header.flags);
        survive(&frame, &mut header);
    }
}

/// No panic, no more output than allowed, and the payload in order, whatever the input.
fn survive(frame: &[u8], header: &mut NetHeader) {
    let checked = check(header, frame.len());
    match segments(frame, header) {
        Ok(made) => {
            assert_eq!(checked, Ok(()));
            assert!(made.len() <= MAX_SEGMENTS);
            let headers = Segments::new(frame, header).unwrap().headers_len();
            assert!(made.iter().all(|segment| segment.len() <= headers + usize::from(header.gso_size)));
            let payload: Vec<u8> = made.iter().flat_map(|segment| segment[headers..].to_vec()).collect();
            assert_eq!(payload, frame[headers..]);
        }
        Err(error) => assert!(!error.to_string().is_empty() && !error.name().is_empty()),
    }
    let mut copy = frame.to_vec();
    let before = *header;
    if complete_checksum(&mut copy, header).is_err() {
        assert!(copy == frame && *header == before && checked.is_err());
    }
}

fn refused(recipe: &Recipe, change: impl FnOnce(&mut Vec<u8>, &mut NetHeader)) -> OffloadError {
    let (mut frame, mut header) = recipe.frame();
    change(&mut frame, &mut header);
    let mut emitted = 0;
    let error = segment(&frame, &header, |_, _| emitted += 1).unwrap_err();
    assert_eq!(emitted, 0);
    error
}

#[test]
fn lying_headers_are_named() {
    let v4 = Recipe::default();
    let v6 = Recipe { v6: true, ..Recipe::default() };
    let udp = Recipe { tcp: false, ..Recipe::default() };
    let len = v4.frame().0.len();
    assert_eq!(
        refused(&v4, |_, header| header.csum_start = 60000),
        OffloadError::ChecksumPlace { start: 60000, offset: 16, len }
    );
    assert_eq!(refused(&v4, |_, header| header.csum_start = 13).name(), "checksum_place");
    assert_eq!(refused(&v4, |_, header| header.csum_offset = 65535).name(), "checksum_place");
    assert_eq!(
        refused(&v4, |_, header| header.csum_start = 38),
        OffloadError::ChecksumMismatch { start: 38, offset: 16, real_start: 34, real_offset: 16 }
    );
    assert_eq!(refused(&udp, |_, header| header.csum_offset = 16).name(), "checksum_mismatch");
    assert_eq!(refused(&v4, |_, header| header.gso_size = 0), OffloadError::ZeroSize(GSO_TCPV4));
    assert_eq!(refused(&v4, |_, header| header.flags = 0), OffloadError::NotPartial(GSO_TCPV4));
    assert_eq!(
        refused(&v4, |_, header| header.gso_type = GSO_TCPV6),
        OffloadError::WrongNetwork { gso_type: GSO_TCPV6, ethertype: 0x0800 }
    );
    assert_eq!(refused(&v6, |_, header| header.gso_type = GSO_TCPV4).name(), "wrong_network");
    assert_eq!(refused(&v4, |frame, _| frame[12..14].copy_from_slice(&[8, 6])).name(), "wrong_network");
    assert_eq!(
        refused(&v4, |_, header| header.gso_type = GSO_UDP_L4),
        OffloadError::WrongTransport { gso_type: GSO_UDP_L4, protocol: 6 }
    );
    assert_eq!(refused(&udp, |_, header| header.gso_type = GSO_TCPV4).name(), "wrong_transport");
    assert_eq!(refused(&udp, |_, header| header.gso_type = GSO_UDP), OffloadError::Fragmentation);
    for unknown in [2, 6, 0x7f, GSO_ECN, GSO_ECN | GSO_UDP_L4, GSO_ECN | GSO_UDP] {
        assert_eq!(refused(&v4, |_, header| header.gso_type = unknown), OffloadError::UnknownGso(unknown));
    }
    assert_eq!(refused(&v4, |_, header| header.gso_type = GSO_NONE).name(), "unknown_gso");
    assert_eq!(refused(&v4, |frame, _| frame[14] = 0x65).name(), "wrong_version");
    assert_eq!(refused(&v6, |frame, _| frame[14] = 0x45).name(), "wrong_version");
    assert_eq!(
        refused(&v4, |frame, _| frame[14] = 0x44),
        OffloadError::BadHeader { what: "IPv4 header length", found: 16, least: 20 }
    );
    assert_eq!(refused(&v4, |frame, _| frame[20] = 0x20), OffloadError::Fragment);
    assert_eq!(refused(&v4, |frame, _| frame[21] = 1), OffloadError::Fragment);
    assert_eq!(refused(&v6, |frame, _| frame[20] = 44), OffloadError::Fragment);
    assert_eq!(
        refused(&v4, |frame, _| frame[34 + 12] = 0x40),
        OffloadError::BadHeader { what: "TCP data offset", found: 16, least: 20 }
    );
    let extended = Recipe { extra: 16, ..v6.clone() };
    assert_eq!(refused(&extended, |frame, _| (frame[20], frame[57]) = (43, 3)), OffloadError::RoutingHeader(3));
    assert_eq!(refused(&extended, |frame, _| frame[55] = 200).name(), "headers_too_long");
    let most = Recipe { extra: 16 * 8, options: 40, tags: vec![1, 2], ..v6 };
    assert!(most.payload_at() < 256);
    assert!(segments(&most.frame().0, &most.frame().1).is_ok());
    assert_eq!(refused(&Recipe { extra: 18 * 8, ..most }, |_, _| {}).name(), "headers_too_long");
}

#[test]
fn truncated_headers_are_named() {
    for recipe in [
        Recipe::default(),
        Recipe { v6: true, extra: 24, tags: vec![7], ..Recipe::default() },
        Recipe { tcp: false, extra: 8, ..Recipe::default() },
    ] {
        for len in 0..recipe.payload_at() {
            let error = refused(&recipe, |frame, _| frame.truncate(len));
            assert!(matches!(error.name(), "truncated" | "checksum_place"), "{len}: {error}");
        }
        let (mut frame, header) = recipe.frame();
        frame.truncate(recipe.payload_at());
        assert_segments(&Recipe { payload: Vec::new(), ..recipe }, &frame, &segments(&frame, &header).unwrap());
    }
}

#[test]
fn sizes_at_their_limits() {
    // A segment for each byte would be a hundred times the work.
    let small = Recipe { payload: vec![0; MAX_SEGMENTS + 1], gso_size: 1, ..Recipe::default() };
    let found = MAX_SEGMENTS + 1;
    assert_eq!(refused(&small, |_, _| {}), OffloadError::TooManySegments { size: 1, found });
    let small = Recipe { payload: vec![3; MAX_SEGMENTS], ..small };
    let (frame, header) = small.frame();
    assert_segments(&small, &frame, &segments(&frame, &header).unwrap());
    // The largest packets there are: 65535 bytes with the IPv4 header, without the IPv6 header.
    for (v6, headers) in [(false, 20 + 20), (true, 20)] {
        let largest =
            Recipe { v6, options: 0, payload: vec![5; 65535 - headers], gso_size: 65535, ..Recipe::default() };
        let (frame, header) = largest.frame();
        assert_segments(&largest, &frame, &segments(&frame, &header).unwrap());
        let larger = Recipe { payload: vec![5; 65535 - headers + 1], ..largest };
        assert_eq!(refused(&larger, |_, _| {}), OffloadError::SegmentTooLong { found: 65536 });
    }
}

#[test]
fn flags_go_where_they_belong() {
    // FIN, PSH, ACK, CWR in three segments.
    let recipe = Recipe { flags: 0x99, ..Recipe::default() };
    let (frame, header) = recipe.frame();
    assert_eq!(header.gso_type, GSO_TCPV4 | GSO_ECN);
    let flags: Vec<u8> = segments(&frame, &header).unwrap().iter().map(|segment| segment[34 + 13]).collect();
    assert_eq!(flags, [0x90, 0x10, 0x19]);
}

#[test]
fn checksum_that_comes_out_as_zero_is_sent_as_its_other_form() {
    let recipe = Recipe { tcp: false, payload: vec![0, 0], ..Recipe::default() };
    let (mut frame, header) = recipe.frame();
    // With the sum so far as payload, everything adds up to ffff.
    let mut plain = frame.clone();
    let mut once = NetHeader { gso_type: GSO_NONE, ..header };
    complete_checksum(&mut plain, &mut once).unwrap();
    let at = recipe.transport() + 6;
    let (checksum, payload) = ([plain[at], plain[at + 1]], recipe.payload_at());
    frame[payload..].copy_from_slice(&checksum);
    let mut zero = NetHeader { gso_type: GSO_NONE, ..header };
    let made = segments(&frame, &header).unwrap();
    assert_eq!(made[0][at..at + 2], [0xff, 0xff]);
    complete_checksum(&mut frame, &mut zero).unwrap();
    assert_eq!(frame[at..at + 2], [0xff, 0xff]);
    assert_eq!(made, [frame]);
}

#[test]
fn header_is_checked_without_the_frame() {
    let plain = NetHeader::default();
    assert_eq!(check(&plain, 60), Ok(()));
    // Without NEEDS_CSUM the fields mean nothing (virtio 1.2, 5.1.6.2.2).
    assert_eq!(check(&NetHeader { csum_start: 9999, ..plain }, 60), Ok(()));
    let partial = NetHeader { flags: NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..plain };
    assert_eq!(check(&partial, 52), Ok(()));
    assert_eq!(check(&partial, 51), Err(OffloadError::ChecksumPlace { start: 34, offset: 16, len: 51 }));
    let large = NetHeader { gso_type: GSO_TCPV6, gso_size: 1440, ..partial };
    assert_eq!(check(&large, 9000), Ok(()));
    assert_eq!(check(&NetHeader { gso_size: 0, ..large }, 9000), Err(OffloadError::ZeroSize(GSO_TCPV6)));
    assert_eq!(check(&NetHeader { flags: 0, ..large }, 9000), Err(OffloadError::NotPartial(GSO_TCPV6)));
}
