//! Two stations and a cable: the stack and the tasks without any queue.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use viaduct_guest::cable::{CableEnd, Fate, cable};
use viaduct_guest::link::{LinkCapabilities, LinkCounters};
use viaduct_guest::stack::{StackConfig, StackError};
use viaduct_guest::station::{
    DatagramConfig, DatagramReport, Direction, Event, Limit, Outcome, PingConfig, PingReport, Ports, Station,
    StationError, StreamConfig, StreamReport, TaskSpec, Ticket,
};

const PATIENCE: Duration = Duration::from_secs(20);

fn config(number: u8, mtu: usize) -> StackConfig {
    StackConfig {
        mac: [2, 0, 0, 0, 0, number],
        addresses: vec![([10, 0, 0, number].into(), 24), ([0xfd00, 0, 0, 0, 0, 0, 0, number.into()].into(), 64)],
        gateways: vec![],
        mtu,
        seed: number.into(),
    }
}

fn station(number: u8, mtu: usize) -> Station {
    Station::new(config(number, mtu), Arc::default()).expect("a station")
}

fn wires(mtu: usize) -> (CableEnd, CableEnd) {
    cable(LinkCapabilities { mtu, checksum: true, segmentation: false }, 1024).expect("a cable")
}

/// Two guests on one cable.
fn pair(mtu: usize) -> (Station, Station) {
    let (a, b) = wires(mtu);
    let (left, right) = (station(1, mtu), station(2, mtu));
    left.attach(Box::new(a));
    right.attach(Box::new(b));
    (left, right)
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

fn right_v4() -> IpAddr {
    [10, 0, 0, 2].into()
}

fn right_v6() -> IpAddr {
    [0xfd00, 0, 0, 0, 0, 0, 0, 2].into()
}

fn ping(station: &mut Station, remote: IpAddr, size: usize) -> PingReport {
    let timeout = Duration::from_secs(10);
    let interval = Duration::from_millis(1);
    let ticket = station.start(TaskSpec::Ping(PingConfig { remote, count: 5, interval, timeout, size }));
    match outcome(station, ticket) {
        Outcome::Ping(report) => report,
        other => panic!("{other:?}"),
    }
}

fn stream_config(remote: IpAddr, direction: Direction, bytes: u64) -> StreamConfig {
    let port = match direction {
        Direction::Send => 9,
        Direction::Receive => 19,
        Direction::Echo => 7,
    };
    StreamConfig { remote, port, direction, limit: Limit::Bytes(bytes), patience: PATIENCE, seed: 99 }
}

fn stream(station: &mut Station, remote: IpAddr, direction: Direction, bytes: u64) -> StreamReport {
    let ticket = station.start(TaskSpec::Stream(stream_config(remote, direction, bytes)));
    match outcome(station, ticket) {
        Outcome::Stream(report) => report,
        other => panic!("{other:?}"),
    }
}

fn failure(station: &mut Station, task: TaskSpec) -> String {
    let ticket = station.start(task);
    match outcome(station, ticket) {
        Outcome::Failed(why) => why,
        Outcome::Stream(StreamReport { error: Some(why), .. }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ping_over_both_ip_versions_at_any_mtu() {
    for mtu in [1280, 1500, 9000, 65521] {
        let (mut left, _right) = pair(mtu);
        for (remote, size) in [(right_v4(), 56), (right_v4(), mtu - 28), (right_v6(), 56), (right_v6(), mtu - 48)] {
            let report = ping(&mut left, remote, size);
            assert_eq!((report.sent, report.received), (5, 5), "{remote} {size} bytes over {mtu}");
            assert_eq!((report.duplicated, report.corrupted), (0, 0));
            assert_eq!(report.round_trips.len(), 5);
            assert_eq!(report.summary.map(|s| s.count), Some(5));
        }
    }
}

#[test]
fn ping_in_fragments() {
    let (mut left, _right) = pair(1500);
    let report = ping(&mut left, right_v4(), 20_000);
    assert_eq!((report.sent, report.received, report.corrupted), (5, 5, 0));
}

#[test]
fn ping_counts_what_the_cable_does() {
    let (a, b) = wires(1500);
    let (mut left, right) = (station(1, 1500), station(2, 1500));
    // By the sequence number of echo replies.
    let fault = Box::new(|frame: &[u8]| match (frame[23], frame.get(34), frame.get(41)) {
        (1, Some(0), Some(1)) => Fate::Drop,
        (1, Some(0), Some(2)) => Fate::Duplicate,
        (1, Some(0), Some(3)) => Fate::Corrupt,
        _ => Fate::Deliver,
    });
    left.attach(Box::new(a));
    right.attach(Box::new(b.with_fault(fault)));
    let timeout = Duration::from_millis(500);
    let interval = Duration::from_millis(20);
    let ticket = left.start(TaskSpec::Ping(PingConfig { remote: right_v4(), count: 5, interval, timeout, size: 56 }));
    let Outcome::Ping(report) = outcome(&left, ticket) else { panic!("not a ping") };
    // A flipped bit is found by the ICMP checksum, so that reply is lost.
    assert_eq!((report.sent, report.received, report.duplicated), (5, 3, 1));
}

#[test]
fn ping_to_an_address_that_nobody_has_ends() {
    let (mut left, _right) = pair(1500);
    let remote = [10, 0, 0, 9].into();
    let (timeout, interval) = (Duration::from_millis(50), Duration::ZERO);
    let ticket = left.start(TaskSpec::Ping(PingConfig { remote, count: 2000, interval, timeout, size: 56 }));
    let Outcome::Ping(report) = outcome(&left, ticket) else { panic!("not a ping") };
    assert_eq!((report.sent, report.received), (2000, 0));
}

#[test]
fn streams_each_way_arrive_whole() {
    let bytes = 3_000_001;
    for remote in [right_v4(), right_v6()] {
        let (mut left, mut right) = pair(1500);
        right.start(TaskSpec::Serve(Ports::default()));
        let report = stream(&mut left, remote, Direction::Send, bytes);
        assert_eq!((report.sent, report.error), (bytes, None));
        let answer = report.peer.expect("the sink's answer");
        assert!(answer.starts_with(r#"{"bytes": 3000001, "verified": true, "first_mismatch": null,"#), "{answer}");

        let report = stream(&mut left, remote, Direction::Echo, bytes);
        assert_eq!((report.sent, report.received), (bytes, bytes));
        assert_eq!((report.first_mismatch, report.error), (None, None));

        let report = stream(&mut left, remote, Direction::Receive, bytes);
        assert!(report.received >= bytes);
        assert_eq!((report.first_mismatch, report.error), (None, None));
    }
}

#[test]
fn a_stream_survives_losses_and_corruption() {
    let (a, b) = wires(1500);
    let (mut left, mut right) = (station(1, 1500), station(2, 1500));
    let fault = |kind| {
        let mut sent = 0;
        Box::new(move |_: &[u8]| {
            sent += 1;
            if sent % 97 == 50 { kind } else { Fate::Deliver }
        })
    };
    left.attach(Box::new(a.with_fault(fault(Fate::Drop))));
    right.attach(Box::new(b.with_fault(fault(Fate::Corrupt))));
    right.start(TaskSpec::Serve(Ports::default()));
    let report = stream(&mut left, right_v4(), Direction::Echo, 500_000);
    assert_eq!((report.received, report.first_mismatch, report.error), (500_000, None, None));
}

#[test]
fn a_stream_survives_a_new_link() {
    let (mut left, mut right) = pair(1500);
    right.start(TaskSpec::Serve(Ports::default()));
    let config =
        StreamConfig { limit: Limit::Time(Duration::from_secs(2)), ..stream_config(right_v4(), Direction::Send, 0) };
    let ticket = left.start(TaskSpec::Stream(config));
    std::thread::sleep(Duration::from_millis(200));
    left.detach();
    right.detach();
    assert!(!left.link_up());
    std::thread::sleep(Duration::from_millis(100));
    let (a, b) = wires(1500);
    left.attach(Box::new(a));
    right.attach(Box::new(b));
    let Outcome::Stream(report) = outcome(&left, ticket) else { panic!("not a stream") };
    assert_eq!(report.error, None);
    assert!(report.peer.is_some_and(|answer| answer.contains(r#""verified": true"#)));
    assert!(left.link_up());
}

#[test]
fn datagrams_are_counted_by_the_sink() {
    for (remote, size) in [(right_v4(), 20), (right_v4(), 4000), (right_v6(), 1000)] {
        let (mut left, mut right) = pair(1500);
        right.start(TaskSpec::Serve(Ports::default()));
        let config = DatagramConfig {
            remote,
            port: 9,
            size,
            rate: Some(2000.0),
            limit: Limit::Bytes(200 * size as u64),
            patience: PATIENCE,
            seed: 5,
        };
        let ticket = left.start(TaskSpec::Datagrams(config));
        let Outcome::Datagrams(DatagramReport { sent, peer, .. }) = outcome(&left, ticket) else { panic!() };
        assert_eq!(sent, 200);
        let expected =
            format!(r#"{{"received": 200, "bytes": {}, "duplicated": 0, "reordered": 0, "corrupted": 0}}"#, 200 * size);
        assert_eq!(peer, Some(expected));
        assert!(right.services().snapshot().contains(&("datagrams", 201)));
    }
}

#[test]
fn failures_say_what_to_do() {
    let (mut left, _right) = pair(1500);
    let refused = failure(&mut left, TaskSpec::Stream(stream_config(right_v4(), Direction::Send, 1)));
    assert!(refused.contains("refused") && refused.contains("viaduct guest serve"), "{refused}");
    let patience = Duration::from_millis(300);
    let nobody = StreamConfig { patience, ..stream_config([10, 0, 0, 9].into(), Direction::Send, 1) };
    assert!(failure(&mut left, TaskSpec::Stream(nobody)).contains("no answer"));
    let elsewhere = failure(&mut left, TaskSpec::Stream(stream_config([192, 168, 0, 1].into(), Direction::Send, 1)));
    assert!(elsewhere.contains("gateway"), "{elsewhere}");
    let broadcast = failure(&mut left, TaskSpec::Stream(stream_config([255; 4].into(), Direction::Send, 1)));
    assert!(broadcast.contains("not the address of one host"), "{broadcast}");
}

#[test]
fn cancelling_gives_what_there_is_and_dropping_ends_everything() {
    let (mut left, _right) = pair(1500);
    let endless = PingConfig {
        remote: right_v4(),
        count: 0,
        interval: Duration::from_millis(1),
        timeout: Duration::from_secs(1),
        size: 56,
    };
    let ticket = left.start(TaskSpec::Ping(endless));
    // Long enough for some replies on any machine.
    std::thread::sleep(Duration::from_millis(500));
    left.cancel(ticket);
    let Outcome::Ping(report) = outcome(&left, ticket) else { panic!("not a ping") };
    assert!(report.received > 0);
}

#[test]
fn an_idle_station_sleeps() {
    let (left, right) = pair(1500);
    std::thread::sleep(Duration::from_millis(200));
    let sleeps = |station: &Station| {
        let counters: &LinkCounters = station.counters();
        counters.sleeps.load(std::sync::atomic::Ordering::Relaxed)
    };
    let before = (sleeps(&left), sleeps(&right));
    std::thread::sleep(Duration::from_millis(300));
    assert!(sleeps(&left) - before.0 <= 2 && sleeps(&right) - before.1 <= 2);
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let refused = |change: fn(&mut StackConfig)| {
        let mut config = config(1, 1500);
        change(&mut config);
        match Station::new(config, Arc::default()) {
            Err(StationError::Config(error)) => error,
            _ => panic!("accepted"),
        }
    };
    assert_eq!(refused(|c| c.mac[0] = 1), StackError::Mac([1, 0, 0, 0, 0, 1]));
    assert_eq!(refused(|c| c.mtu = 65522), StackError::Mtu(65522));
    assert_eq!(refused(|c| c.mtu = 1279), StackError::Mtu(1279));
    assert_eq!(refused(|c| c.addresses[0].1 = 33), StackError::Prefix([10, 0, 0, 1].into(), 33));
    assert_eq!(refused(|c| c.gateways = vec![[10, 0, 0, 3].into(), [10, 0, 0, 4].into()]), StackError::Gateways);
}
