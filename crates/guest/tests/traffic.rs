//! Source and sink over the driver and a wire.

mod wire;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use viaduct_guest::features::{NET_MRG_RXBUF, RING_EVENT_IDX, RING_INDIRECT_DESC, RING_PACKED};
use viaduct_guest::link::LinkCounters;
use viaduct_guest::traffic::{
    Engine, EngineEvent, Job, Sink, SinkConfig, SinkReport, Source, SourceConfig, SourceError,
};
use wire::{Device, Mode, Wire, end};

fn source_config(size: usize, count: u64) -> SourceConfig {
    SourceConfig {
        source: [2, 0, 0, 0, 0, 1],
        destination: [2, 0, 0, 0, 1, 1],
        macs: 1,
        flows: 1,
        size,
        rate: None,
        burst: 1,
        count: Some(count),
        time: None,
        session: 7,
    }
}

fn sink_config() -> SinkConfig {
    SinkConfig { mac: [2, 0, 0, 0, 1, 1], macs: 1, verify: true, count: None }
}

fn engine<J: Job>(job: J, mode: Mode) -> (Engine<J>, Device) {
    let counters: Arc<LinkCounters> = Arc::default();
    let (driver, device) = end(mode, &counters);
    let engine = Engine::new(job, counters).expect("a thread");
    engine.attach(driver);
    (engine, device)
}

fn wait_for(what: impl Fn() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(30);
    while !what() {
        assert!(Instant::now() < give_up, "it did not happen in 30 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn run(mode: Mode, config: SourceConfig) -> SinkReport {
    let count = config.count.expect("a count");
    let (sink, b) = engine(Sink::new(sink_config()), mode);
    let (source, a) = engine(Source::new(config, mode.mtu).expect("a source"), mode);
    let _wire = Wire::new(a, b);
    wait_for(|| source.take_events() == [EngineEvent::Done]);
    assert_eq!(source.report().sent, count);
    // Every sleep of the sink brings its report up to date.
    wait_for(|| sink.report().received + sink.report().corrupted >= count);
    sink.report()
}

#[test]
fn every_frame_arrives_as_it_was_sent() {
    for features in [0, RING_PACKED, NET_MRG_RXBUF | RING_EVENT_IDX, RING_PACKED | RING_INDIRECT_DESC | NET_MRG_RXBUF] {
        for (size, mtu) in [(64, 1500), (65, 1500), (1514, 1500), (9014, 9000), (65535, 65521)] {
            let mode = Mode { features, mtu, pairs: 1, size: 64 };
            let report = run(mode, source_config(size, 500));
            assert_eq!((report.received, report.bytes), (500, 500 * size as u64), "{mode:x?} {size}");
            assert_eq!((report.lost, report.duplicated, report.reordered, report.corrupted), (0, 0, 0, 0));
            assert_eq!(report.flows, 1);
            assert_eq!(report.latency.map(|l| l.count), Some(500));
            // The source's announcement.
            assert_eq!(report.foreign, 1);
        }
    }
}

#[test]
fn flows_and_addresses_and_queue_pairs() {
    let mode = Mode { features: RING_PACKED, mtu: 1500, pairs: 2, size: 128 };
    let config = SourceConfig { flows: 100, macs: 10, ..source_config(200, 10_000) };
    let report = run(mode, config);
    assert_eq!((report.received, report.flows, report.lost, report.corrupted), (10_000, 100, 0, 0));
    assert_eq!(report.reordered, 0);
    assert_eq!(report.foreign, 10);
}

#[test]
fn a_rate_is_kept() {
    let mode = Mode { features: 0, mtu: 1500, pairs: 1, size: 64 };
    for burst in [1, 16] {
        let config = SourceConfig { rate: Some(2000.0), burst, ..source_config(64, 400) };
        let (source, a) = engine(Source::new(config, 1500).expect("a source"), mode);
        let (_sink, b) = engine(Sink::new(sink_config()), mode);
        let _wire = Wire::new(a, b);
        wait_for(|| source.take_events() == [EngineEvent::Done]);
        // 400 frames at 2000 a second cannot have left earlier.
        assert!(source.report().elapsed >= (400 - u64::from(burst)) * 500_000);
    }
}

#[test]
fn what_goes_wrong_on_the_way_is_counted() {
    let mode = Mode { features: 0, mtu: 1500, pairs: 1, size: 64 };
    let (sink, mut b) = engine(Sink::new(sink_config()), mode);
    let (source, mut a) = engine(Source::new(source_config(100, 40), 1500).expect("a source"), mode);
    let mut frames = Vec::new();
    wait_for(move_frames(&mut a, &mut frames, 41));
    drop(source);
    let mut frames: Vec<Vec<u8>> = frames.into_iter().skip(1).collect();
    frames.remove(30);
    frames.remove(20);
    let again = frames[10].clone();
    frames.insert(11, again);
    frames.swap(5, 6);
    frames[15][12 + 99] ^= 1;
    frames[16][12 + 57] ^= 1;
    frames.push(vec![0; 80]);
    for frame in &frames {
        assert!(b.give(frame, 0));
    }
    wait_for(|| sink.report().foreign == 1);
    let report = sink.report();
    // 40 frames, of which two were lost and two corrupted, and what is corrupted counts as lost as well.
    assert_eq!((report.received, report.lost, report.corrupted), (36, 4, 2));
    assert_eq!((report.duplicated, report.reordered), (1, 1));
}

/// Collects frames until there are `n`.
fn move_frames<'a>(device: &'a mut Device, frames: &'a mut Vec<Vec<u8>>, n: usize) -> impl Fn() -> bool + 'a {
    let state = std::cell::RefCell::new((device, frames));
    move || {
        let (device, frames) = &mut *state.borrow_mut();
        frames.extend(device.sent().into_iter().map(|(_, frame)| frame));
        frames.len() >= n
    }
}

#[test]
fn a_full_ring_is_waited_for_without_spinning() {
    let mode = Mode { features: 0, mtu: 1500, pairs: 1, size: 16 };
    let (source, mut a) = engine(Source::new(source_config(64, 1000), 1500).expect("a source"), mode);
    let sleeps = || source.counters().sleeps.load(Ordering::Relaxed);
    wait_for(|| source.report().sent == 15 && sleeps() > 0);
    std::thread::sleep(Duration::from_millis(50));
    let before = sleeps();
    std::thread::sleep(Duration::from_millis(200));
    assert!(sleeps() - before <= 1);
    let mut frames = Vec::new();
    wait_for(move_frames(&mut a, &mut frames, 1001));
    wait_for(|| source.take_events() == [EngineEvent::Done]);
    assert!(source.report().full > 0);
}

#[test]
fn a_sink_without_traffic_sleeps_and_announces_itself() {
    let mode = Mode { features: RING_EVENT_IDX, mtu: 1500, pairs: 1, size: 16 };
    let config = SinkConfig { macs: 3, ..sink_config() };
    let (sink, mut b) = engine(Sink::new(config), mode);
    let mut frames = Vec::new();
    wait_for(move_frames(&mut b, &mut frames, 6));
    let senders: Vec<u8> = frames.iter().map(|frame| frame[12 + 11]).collect();
    assert_eq!(senders, [1, 2, 3, 1, 2, 3]);
    assert!(sink.counters().sleeps.load(Ordering::Relaxed) < 20);
}

#[test]
fn a_lost_link_is_no_end() {
    let mode = Mode { features: RING_PACKED, mtu: 1500, pairs: 1, size: 64 };
    let (sink, b) = engine(Sink::new(sink_config()), mode);
    let config = SourceConfig { rate: Some(10_000.0), ..source_config(64, 5000) };
    let (source, a) = engine(Source::new(config, 1500).expect("a source"), mode);
    let wire = Wire::new(a, b);
    wait_for(|| source.report().sent > 500);
    source.detach();
    sink.detach();
    drop(wire);
    let (driver, a) = end(mode, source.counters());
    source.attach(driver);
    let (driver, b) = end(mode, sink.counters());
    sink.attach(driver);
    let _wire = Wire::new(a, b);
    wait_for(|| source.take_events() == [EngineEvent::Done]);
    assert_eq!(source.report().sent, 5000);
    wait_for(|| sink.report().received + sink.report().lost >= 4900);
    let report = sink.report();
    assert_eq!((report.corrupted, report.duplicated, report.reordered), (0, 0, 0));
}

#[test]
fn impossible_traffic_is_refused() {
    let refused = |change: fn(&mut SourceConfig)| {
        let mut config = source_config(64, 1);
        change(&mut config);
        Source::new(config, 1500).err()
    };
    assert_eq!(refused(|c| c.size = 63), Some(SourceError::Size(63, 1514)));
    assert_eq!(refused(|c| c.size = 1515), Some(SourceError::Size(1515, 1514)));
    assert_eq!(refused(|c| c.flows = 0), Some(SourceError::Zero("the number of flows")));
    assert_eq!(refused(|c| c.rate = Some(0.0)), Some(SourceError::Zero("the rate")));
    assert_eq!(refused(|_| {}), None);
}
