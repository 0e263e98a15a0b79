//! Frames between stations: learning, flooding, every ring mode, every shape of buffer.

mod station;

use station::{BROADCAST, Options, Station, frame, mac, stats, switch, until};
use viaduct_ring::Layout;
use viaduct_switch::counters::DropReason;
use viaduct_switch::net_header::NetHeader;

fn dropped(switch: &viaduct_switch::Switch, port: u16, reason: DropReason) -> u64 {
    let stats = stats(switch, port);
    stats.received.iter().chain(&stats.sent).map(|queue| queue.drops[reason as usize]).sum()
}

#[test]
fn unknown_destinations_flood_and_known_ones_do_not() {
    let switch = switch(1);
    let [mut a, mut b, mut c] = [(); 3].map(|()| Station::plug(&switch, Options::default()));
    let hello = frame(mac(2), mac(1), 60, 1);
    a.send(&hello);
    b.expect(&hello);
    c.expect(&hello);
    let answer = frame(mac(1), mac(2), 61, 2);
    b.send(&answer);
    a.expect(&answer);
    let again = frame(mac(2), mac(1), 62, 3);
    a.send(&again);
    b.expect(&again);
    let last = frame(BROADCAST, mac(1), 63, 4);
    a.send(&last);
    b.expect(&last);
    // The unicast ones did not come here, nor did anything come back to its sender.
    c.expect(&last);
    assert!(a.poll().is_none());
    let mut learned: Vec<_> = switch.stations().iter().map(|entry| (entry.mac, entry.port)).collect();
    learned.sort_unstable();
    assert_eq!(learned, [(mac(1), a.port), (mac(2), b.port)]);
}

#[test]
fn every_ring_mode_talks_to_every_other() {
    let modes = [
        Options::default(),
        Options { mergeable: false, ..Options::default() },
        Options { layout: Layout::Packed, ..Options::default() },
        Options { layout: Layout::Packed, mergeable: false, size: 7, buffers: 7, ..Options::default() },
        Options { header_len: 10, mergeable: false, ..Options::default() },
        Options { buffer: 64, size: 1024, buffers: 1024, ..Options::default() },
        Options { layout: Layout::Packed, buffer: 100, size: 999, buffers: 999, ..Options::default() },
    ];
    let switch = switch(1);
    let mut stations: Vec<_> = modes.map(|options| Station::plug(&switch, options)).into();
    for from in 0..stations.len() {
        for len in [14, 15, 16, 17, 59, 60, 64, 65, 127, 128, 500, 1514] {
            let sent = frame(BROADCAST, mac(from as u8), len, from as u8);
            stations[from].send(&sent);
            for (to, station) in stations.iter_mut().enumerate() {
                if to != from {
                    station.expect(&sent);
                }
            }
            stations[from].reclaim();
        }
    }
}

#[test]
fn a_frame_may_be_sent_in_pieces_of_any_size() {
    let switch = switch(1);
    let [mut a, mut b] = [(); 2].map(|()| Station::plug(&switch, Options { buffer: 300, ..Options::default() }));
    for (seed, pieces) in [
        &[12][..],
        &[1, 1, 1],
        &[10, 2, 3],
        &[12, 6, 6, 2],
        &[11, 2],
        &[12, 14],
        &[20, 20, 20],
        &[27, 1],
        &[28, 1],
        &[5, 300, 300],
    ]
    .iter()
    .enumerate()
    {
        for len in [60, 700] {
            let sent = frame(BROADCAST, mac(1), len, seed as u8);
            a.send_in_pieces(NetHeader::default(), &sent, pieces);
            b.expect(&sent);
        }
    }
}

#[test]
fn what_is_wrong_with_a_frame_is_counted_by_reason() {
    let switch = switch(1);
    let [mut a, mut b] = [(); 2].map(|()| Station::plug(&switch, Options::default()));
    let header = NetHeader::default();
    let good = frame(BROADCAST, mac(1), 60, 0);
    a.send(&good[..13]);
    a.send_in_pieces(header, &good[..0], &[]);
    a.send(&frame(BROADCAST, [3, 0, 0, 0, 0, 1], 60, 0));
    a.send(&frame([1, 0x80, 0xc2, 0, 0, 0x0e], mac(1), 60, 0));
    a.send_in_pieces(NetHeader { flags: 1, csum_start: 50, csum_offset: 9, ..header }, &good, &[]);
    a.send_in_pieces(NetHeader { flags: 1, csum_start: 4, csum_offset: 2, ..header }, &good, &[]);
    a.send_in_pieces(NetHeader { flags: 1, csum_start: 65535, csum_offset: 65535, ..header }, &good, &[]);
    a.send_in_pieces(NetHeader { gso_type: 1, gso_size: 100, ..header }, &good, &[]);
    a.send_in_pieces(NetHeader { flags: 1, csum_start: 34, csum_offset: 16, gso_type: 1, ..header }, &good, &[]);
    a.send_in_pieces(NetHeader { flags: 1, csum_start: 34, gso_type: 77, gso_size: 9, ..header }, &good, &[]);
    a.send(&good);
    b.expect(&good);
    b.send(&frame(BROADCAST, mac(9), 60, 0));
    a.receive().expect("a broadcast floods");
    b.send(&frame(mac(9), mac(2), 60, 0));
    b.reclaim();
    for (port, reason, count) in [
        (a.port, DropReason::Runt, 2),
        (a.port, DropReason::BadSource, 1),
        (a.port, DropReason::ReservedGroup, 1),
        (a.port, DropReason::BadHeader, 6),
        (b.port, DropReason::NoDestination, 1),
    ] {
        until(|| (dropped(&switch, port, reason) == count).then_some(()));
    }
    assert!(a.poll().is_none() && b.poll().is_none());
}

#[test]
fn a_receiver_without_buffers_costs_its_own_frames_only() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options::default());
    let mut stuck = Station::plug(&switch, Options { buffers: 4, ..Options::default() });
    for station in [&mut b, &mut stuck] {
        let port = station.port as u8;
        station.send(&frame(BROADCAST, mac(port), 60, 0));
    }
    a.receive().expect("the announcement");
    a.receive().expect("the announcement");
    b.receive().expect("the announcement");
    for seed in 0..100 {
        a.send(&frame(mac(stuck.port as u8), mac(77), 60, seed));
        let honest = frame(mac(b.port as u8), mac(77), 70, seed);
        a.send(&honest);
        b.expect(&honest);
    }
    a.reclaim();
    let sent = &stats(&switch, stuck.port).sent[0];
    // Four buffers, of which one took the announcement; the driver takes none back.
    assert_eq!(sent.frames, 4);
    until(|| (dropped(&switch, stuck.port, DropReason::NoBuffers) == 97).then_some(()));
}

#[test]
fn frames_wait_for_a_receiver_that_is_only_slow() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options { size: 16, buffers: 16, layout: Layout::Packed, ..Options::default() });
    b.send(&frame(BROADCAST, mac(2), 60, 0));
    a.receive().expect("the announcement");
    let mut received = 0;
    for round in 0..200u8 {
        for _ in 0..8 {
            a.send(&frame(mac(2), mac(1), 64, round));
        }
        while b.poll().is_some() {
            received += 1;
        }
        a.reclaim();
    }
    let lost = dropped(&switch, b.port, DropReason::NoBuffers);
    until(|| {
        while b.poll().is_some() {
            received += 1;
        }
        (received + lost == 1600).then_some(())
    });
}

#[test]
fn a_frame_larger_than_the_port_allows_is_refused() {
    let switch = switch(1);
    let mut a = Station::plug(&switch, Options::default());
    let mut b = Station::plug(&switch, Options { max_frame: 1000, ..Options::default() });
    a.send(&frame(BROADCAST, mac(1), 1001, 0));
    let fits = frame(BROADCAST, mac(1), 1000, 1);
    a.send(&fits);
    b.expect(&fits);
    assert_eq!(dropped(&switch, b.port, DropReason::TooBig), 1);
    let mut narrow = Station::plug(&switch, Options { mergeable: false, buffer: 256, ..Options::default() });
    a.send(&frame(BROADCAST, mac(1), 245, 0));
    let fits = frame(BROADCAST, mac(1), 244, 1);
    a.send(&fits);
    narrow.expect(&fits);
    assert_eq!(dropped(&switch, narrow.port, DropReason::TooBig), 1);
}

#[test]
fn several_pollers_carry_everything_once_and_in_order() {
    let switch = switch(3);
    let mut stations: Vec<_> = (0..4).map(|_| Station::plug(&switch, Options::default())).collect();
    for (n, station) in stations.iter_mut().enumerate() {
        station.send(&frame(BROADCAST, mac(n as u8), 60, 0));
    }
    for station in &mut stations {
        for _ in 0..3 {
            station.receive().expect("three announcements");
        }
    }
    for seed in 0..100u8 {
        for (n, station) in stations.iter_mut().enumerate() {
            station.send(&frame(mac((n as u8 + 1) % 4), mac(n as u8), 100, seed));
        }
        for (n, station) in stations.iter_mut().enumerate() {
            station.expect(&frame(mac(n as u8), mac((n as u8 + 3) % 4), 100, seed));
        }
    }
    let pollers = switch.poller_stats();
    assert!(pollers.iter().all(|poller| poller.frames > 0), "the queues are spread: {pollers:?}");
}
