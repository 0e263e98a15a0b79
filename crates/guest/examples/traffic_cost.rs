//! What a frame costs a traffic source and a sink: time for each, with a device in the same thread that does nothing but
//! take and give buffers, so that only the driver and the frames count.
//!
//! ```text
//! cargo run --release -p viaduct-guest --example traffic_cost
//! ```

#[path = "../tests/wire/mod.rs"]
#[allow(dead_code)]
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use viaduct_guest::features::{NET_MRG_RXBUF, RING_EVENT_IDX, RING_PACKED};
use viaduct_guest::link::LinkCounters;
use viaduct_guest::traffic::{Job, Sink, SinkConfig, Source, SourceConfig};
use viaduct_memory::access::copy;
use viaduct_ring::Batch;
use wire::{Device, Mode, end};

const FRAMES: u64 = 3_000_000;

fn main() {
    for (name, features) in [
        ("split", 0),
        ("split, event index, mergeable", RING_EVENT_IDX | NET_MRG_RXBUF),
        ("packed", RING_PACKED),
        ("packed, event index, mergeable", RING_PACKED | RING_EVENT_IDX | NET_MRG_RXBUF),
    ] {
        for size in [64, 1514] {
            let (source, sink) = cost(features, size);
            let each = |time: Duration| time.as_secs_f64() * 1e9 / FRAMES as f64;
            println!(
                "{name}, {size} bytes: source {:.1} ns ({:.1} Mpps), sink {:.1} ns ({:.1} Mpps)",
                each(source),
                1e3 / each(source),
                each(sink),
                1e3 / each(sink)
            );
        }
    }
}

fn cost(features: u64, size: usize) -> (Duration, Duration) {
    let mode = Mode { features, mtu: 1500, pairs: 1, size: 256 };
    let counters: Arc<LinkCounters> = Arc::default();
    let (mut from, mut out) = end(mode, &counters);
    let (mut to, mut back) = end(mode, &counters);
    let mac = [2, 0, 0, 0, 0, 1];
    let config = SourceConfig {
        source: mac,
        destination: mac,
        macs: 1,
        flows: 1,
        size,
        rate: None,
        burst: 1,
        count: Some(FRAMES),
        time: None,
        session: 1,
    };
    let mut source = Source::new(config, 1500).expect("a source");
    let mut sink = Sink::new(SinkConfig { mac, macs: 1, verify: true, count: None });
    source.attached(&mut from);
    sink.attached(&mut to);
    let (mut sending, mut receiving) = (Duration::ZERO, Duration::ZERO);
    while source.report().sent < FRAMES {
        let start = Instant::now();
        source.step(&mut from).expect("a good device");
        sending += start.elapsed();
        carry(&mut out, &mut back);
        let start = Instant::now();
        sink.step(&mut to).expect("a good device");
        receiving += start.elapsed();
        back.sent();
    }
    (sending, receiving)
}

/// Carries frames straight into the other device's buffers, as far as there are any.
fn carry(from: &mut Device, to: &mut Device) {
    let (from, to) = (&mut from.pairs[0].1.ring, &mut to.pairs[0].0.ring);
    let (mut sent, mut room) = (Batch::with_capacity(64), Batch::with_capacity(64));
    from.peek(&mut sent, 64).expect("a good driver");
    to.peek(&mut room, sent.chains.len()).expect("a good driver");
    for (chain, place) in sent.chains.iter().zip(&room.chains) {
        let (source, target) = (sent.readable(chain)[0], room.writable(place)[0]);
        // SAFETY: both queues keep their memories; the target is not shorter.
        unsafe {
            copy(target.as_ptr(), source.as_ptr(), chain.readable_len as usize);
            // One buffer for each frame (virtio 1.2, 5.1.6.4).
            copy(target.as_ptr().add(10), [1u8, 0].as_ptr(), 2);
        }
    }
    let n = room.chains.len();
    to.consume(&room.chains);
    for (chain, place) in sent.chains.iter().zip(&room.chains) {
        to.complete(place, chain.readable_len);
    }
    to.publish();
    from.consume(&sent.chains[..n]);
    from.complete_all(&sent.chains[..n]);
    from.publish();
}
