//! The driver against the device side of the same rings, in every ring mode.

mod wire;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use viaduct_guest::checksum;
use viaduct_guest::driver::{DriverError, DriverLink, Offload};
use viaduct_guest::features::{
    IN_ORDER, NET_CSUM, NET_GUEST_CSUM, NET_GUEST_TSO4, NET_HOST_TSO4, NET_MRG_RXBUF, RING_EVENT_IDX,
    RING_INDIRECT_DESC, RING_PACKED,
};
use viaduct_guest::link::{Link, LinkCounters};
use viaduct_guest::stack::StackConfig;
use viaduct_guest::station::{
    Direction, Event, Limit, Outcome, PingConfig, Ports, Station, StreamConfig, StreamReport, TaskSpec, Ticket,
};
use wire::{Device, Mode, Wire, end};

const OFFLOADS: u64 = NET_CSUM | NET_GUEST_CSUM | NET_GUEST_TSO4 | NET_HOST_TSO4;

fn station(number: u8, mode: Mode) -> (Station, Device) {
    let config = StackConfig {
        mac: [2, 0, 0, 0, 0, number],
        addresses: vec![([10, 0, 0, number].into(), 24), ([0xfd00, 0, 0, 0, 0, 0, 0, number.into()].into(), 64)],
        gateways: vec![],
        mtu: mode.mtu,
        seed: number.into(),
    };
    let counters: Arc<LinkCounters> = Arc::default();
    let (driver, device) = end(mode, &counters);
    let station = Station::new(config, counters).expect("a station");
    station.attach(Box::new(DriverLink::new(driver)));
    (station, device)
}

fn outcome(station: &Station, ticket: Ticket) -> Outcome {
    let give_up = Instant::now() + Duration::from_secs(60);
    while Instant::now() < give_up {
        if let Some(event) = station.take_events().into_iter().next() {
            match event {
                Event::Finished(found, outcome) if found == ticket => return outcome,
                other => panic!("unexpected {other:?}"),
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no outcome in a minute")
}

fn talk(mode: Mode, bytes: u64) {
    let (mut left, a) = station(1, mode);
    let (mut right, b) = station(2, mode);
    let _wire = Wire::new(a, b);
    right.start(TaskSpec::Serve(Ports::default()));
    let timeout = Duration::from_secs(10);
    for remote in [IpAddr::from([10, 0, 0, 2]), [0xfd00, 0, 0, 0, 0, 0, 0, 2].into()] {
        let size = mode.mtu - 48;
        let ping = PingConfig { remote, count: 3, interval: Duration::from_millis(1), timeout, size };
        let ticket = left.start(TaskSpec::Ping(ping));
        let Outcome::Ping(report) = outcome(&left, ticket) else { panic!("not a ping") };
        assert_eq!((report.sent, report.received, report.corrupted), (3, 3, 0), "{mode:x?}");
        let stream = StreamConfig {
            remote,
            port: 7,
            direction: Direction::Echo,
            limit: Limit::Bytes(bytes),
            patience: timeout,
            seed: 3,
        };
        let ticket = left.start(TaskSpec::Stream(stream));
        let Outcome::Stream(report) = outcome(&left, ticket) else { panic!("not a stream") };
        let StreamReport { received, first_mismatch, error, .. } = report;
        assert_eq!((received, first_mismatch, error), (bytes, None, None), "{mode:x?}");
    }
    for station in [&left, &right] {
        let counters = station.counters();
        assert_eq!(counters.rx_bad_checksum.load(Ordering::Relaxed), 0);
        assert_eq!(counters.rx_violations.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn every_ring_mode() {
    let bits = [RING_PACKED, NET_MRG_RXBUF, RING_EVENT_IDX, RING_INDIRECT_DESC, IN_ORDER];
    for mode in 0..1u64 << bits.len() {
        let features = bits.iter().enumerate().filter(|(i, _)| mode >> i & 1 == 1).map(|(_, bit)| bit).sum();
        talk(Mode { features, mtu: 1500, pairs: 1, size: 64 }, 200_000);
    }
}

#[test]
fn offloads_with_and_without_mergeable_buffers() {
    for features in
        [NET_CSUM | NET_GUEST_CSUM, OFFLOADS, OFFLOADS | NET_MRG_RXBUF, OFFLOADS | NET_MRG_RXBUF | RING_PACKED]
    {
        talk(Mode { features, mtu: 1500, pairs: 1, size: 256 }, 2_000_000);
    }
}

#[test]
fn mtus_and_queue_pairs_and_sizes() {
    for (mtu, pairs, size) in [(9000, 1, 256), (65521, 1, 128), (1500, 2, 256), (1280, 1, 16), (9000, 2, 1024)] {
        for features in [NET_MRG_RXBUF, RING_PACKED] {
            talk(Mode { features, mtu, pairs, size }, 300_000);
        }
    }
    // A packed ring need not have a power of two of descriptors.
    talk(Mode { features: RING_PACKED | NET_MRG_RXBUF, mtu: 1500, pairs: 1, size: 77 }, 300_000);
}

/// A UDP datagram with a good checksum.
fn datagram() -> Vec<u8> {
    let mut frame = vec![0u8; 60];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&46u16.to_be_bytes());
    frame[23] = 17;
    frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    frame[34..40].copy_from_slice(&[1, 2, 3, 4, 0, 26]);
    let (start, offset) = checksum::prepare_partial(&mut frame).expect("a datagram");
    checksum::complete(&mut frame[..60], start, offset);
    frame
}

fn with_header(header: [u8; 12], frame: &[u8]) -> Vec<u8> {
    [&header[..], frame].concat()
}

fn quiet(features: u64) -> (DriverLink, Device, Arc<LinkCounters>) {
    let counters: Arc<LinkCounters> = Arc::default();
    let (driver, device) = end(Mode { features, mtu: 1500, pairs: 1, size: 16 }, &counters);
    (DriverLink::new(driver), device, counters)
}

#[test]
fn what_was_not_negotiated_is_dropped_and_counted() {
    let needs_csum = |start: u8, offset: u8| [1, 0, 0, 0, 0, 0, start, 0, offset, 0, 1, 0];
    let gso = |kind: u8, size: u8| [1, kind, 54, 0, size, 0, 34, 0, 6, 0, 1, 0];
    let cases: [(u64, [u8; 12], bool); 9] = [
        (0, [0; 12], true),
        (0, needs_csum(34, 6), false),
        (NET_GUEST_CSUM, needs_csum(34, 6), true),
        (NET_GUEST_CSUM, needs_csum(34, 25), false),
        (NET_GUEST_CSUM, gso(1, 100), false),
        (OFFLOADS, gso(1, 100), true),
        (OFFLOADS, gso(0x81, 100), true),
        (OFFLOADS, gso(1, 0), false),
        (OFFLOADS, gso(77, 100), false),
    ];
    for (features, header, good) in cases {
        let (mut link, mut device, counters) = quiet(features);
        assert!(device.give(&with_header(header, &datagram()), 0));
        let mut frame = Vec::new();
        assert_eq!(link.receive(&mut frame), good, "{features:x} {header:?}");
        assert_eq!(counters.rx_violations.load(Ordering::Relaxed), u64::from(!good));
        assert_eq!(counters.rx_frames.load(Ordering::Relaxed), u64::from(good));
    }
}

#[test]
fn lengths_that_lie_are_dropped() {
    for bytes in [&[0u8; 12][..], &[0; 25], &[0; 11]] {
        let (mut link, mut device, counters) = quiet(0);
        // Too short for a header, for an Ethernet header.
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().max(12), 0);
        assert!(device.give(&padded, 0));
        assert!(!link.receive(&mut Vec::new()));
        assert_eq!(counters.rx_violations.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn a_wrong_checksum_is_dropped_unless_vouched_for() {
    for (flags, features, good) in [(0u8, 0, false), (2, 0, true), (2, NET_GUEST_CSUM, true)] {
        let (mut link, mut device, counters) = quiet(features);
        let mut frame = datagram();
        frame[50] ^= 1;
        let mut header = [0; 12];
        header[0] = flags;
        assert!(device.give(&with_header(header, &frame), 0));
        assert_eq!(link.receive(&mut Vec::new()), good);
        assert_eq!(counters.rx_bad_checksum.load(Ordering::Relaxed), u64::from(!good));
    }
}

#[test]
fn buffers_are_used_again_for_ever() {
    for features in [0, RING_PACKED | NET_MRG_RXBUF] {
        let (mut link, mut device, counters) = quiet(features);
        for round in 0..200u64 {
            // More than the ring holds: the rest is lost at the device.
            let given = (0..20).filter(|_| device.give(&with_header([0; 12], &datagram()), 0)).count();
            assert_eq!(given, 16, "round {round}");
            let mut frame = Vec::new();
            let mut received = 0;
            while link.receive(&mut frame) {
                assert_eq!(frame, datagram());
                received += 1;
            }
            assert_eq!(received, 16);
            link.flush();
            let mut sent = 0;
            while link.transmit(&mut datagram(), None) {
                sent += 1;
            }
            assert_eq!(sent, 16);
            link.flush();
            assert_eq!(device.sent().len(), 16);
        }
        assert_eq!(counters.tx_full.load(Ordering::Relaxed), 200);
        assert_eq!(counters.tx_frames.load(Ordering::Relaxed), 3200);
    }
}

#[test]
fn transmit_headers_ask_for_what_was_negotiated() {
    let (mut link, mut device, _) = quiet(OFFLOADS);
    assert!(link.transmit(&mut datagram(), None));
    link.flush();
    let sent = device.sent();
    // NEEDS_CSUM, from byte 34, at byte 6 of the UDP header.
    assert_eq!(sent[0].1[..12], [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0]);
    let mut frame = sent[0].1[12..].to_vec();
    assert!(!checksum::verify(&frame));
    assert!(checksum::complete(&mut frame, 34, 6));
    assert!(checksum::verify(&frame));

    let (mut link, mut device, _) = quiet(0);
    assert!(link.transmit(&mut datagram(), None));
    link.flush();
    assert_eq!(device.sent()[0].1[..12], [0; 12]);
}

#[test]
fn a_driver_that_cannot_start_says_why() {
    let counters: Arc<LinkCounters> = Arc::default();
    let mode = Mode { features: 0, mtu: 1500, pairs: 1, size: 16 };
    let (mut driver, _device) = end(mode, &counters);
    let mut frame = [0; 1600];
    // Longer than the MTU: refused.
    assert!(!driver.pairs[0].transmit.send(&mut frame, Offload::default()));
    let config = viaduct_guest::driver::DriverConfig {
        memory: viaduct_memory::GuestMemory::allocate(4096).expect("memory"),
        data_addr: 0,
        data_end: 4096,
        features: 0,
        mtu: 1500,
        queues: vec![],
    };
    assert!(matches!(viaduct_guest::driver::NetDriver::new(config, counters), Err(DriverError::Legacy)));
}
