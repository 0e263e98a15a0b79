use std::sync::Arc;

use parking_lot::Mutex;
use viaduct_memory::iotlb::{Iotlb, Translation};
use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_ring::{DeviceQueue, DriverQueue, Layout, QueueConfig};

use super::*;
use crate::admission::Admission;
use crate::frame::Offloads;
use crate::mac_table::MacTable;
use crate::net_header::{self, NetHeader};
use crate::null::Null;
use crate::port::{InputQueue, OutputState};
use crate::vhost::{VhostInput, VhostOutput, VhostQueue};
use crate::vlan::VlanMode;

fn queue() -> (GuestMemory, DriverQueue, VhostQueue) {
    let memory = GuestMemory::allocate(1 << 20).expect("memory");
    let config = QueueConfig {
        layout: Layout::Split,
        size: 16,
        descriptor_addr: 0,
        driver_addr: 0x1000,
        device_addr: 0x2000,
        base: 0,
        event_idx: false,
        indirect: false,
        in_order: false,
    };
    let queue = DeviceQueue::new(memory.clone(), &config).expect("a legal queue");
    let driver = DriverQueue::new(memory.clone(), &config).expect("a legal queue");
    let queue = VhostQueue { queue, kick: None, call: None, enabled: true, header_len: 12, mergeable: true };
    (memory, driver, queue)
}

fn port(number: u16, input: Input, output: Output) -> Option<Box<Port>> {
    let input = Mutex::new(InputState { input, ..InputState::default() });
    let output = Mutex::new(OutputState { output, ..OutputState::default() });
    Some(Box::new(Port {
        name: String::new(),
        number,
        vlan: VlanMode::All,
        admission: Admission::default(),
        max_frame: u32::MAX,
        accepts: Offloads::NONE,
        inputs: vec![InputQueue { state: input, ..InputQueue::default() }],
        outputs: vec![OutputQueue { state: output, ..OutputQueue::default() }],
        live: vec![0],
        captures: Vec::new(),
        traces: Vec::new(),
    }))
}

#[test]
fn a_queue_disabled_while_a_frame_waits_starts_afresh() {
    let (memory, mut driver, sender) = queue();
    let (_, _, full) = queue();
    let macs = Arc::new(MacTable::new());
    let mut fabric = Fabric::new(1, macs.clone());
    fabric.ports = vec![
        port(0, Input::Vhost(Box::new(VhostInput::new(sender))), Output::Down),
        port(1, Input::Stopped, Output::Vhost(Box::new(VhostOutput::new(full)))),
        port(2, Input::Stopped, Output::Null(Null)),
    ];
    let address = |station: u8| [2, 0, 0, 0, 0, station];
    for station in [1, 2] {
        let [a, b, c, d, e, f] = address(station);
        macs.learn(macs.key(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), 0), station.into());
    }
    let mut send = |station: u8| {
        let frame = [&[0; 12][..], &address(station), &address(9), &[0; 48]].concat();
        let at = 0x10000 + 0x100 * u64::from(station);
        let span = memory.translate(&mut RegionCache::default(), at, frame.len() as u32).expect("in memory");
        // SAFETY: `memory` is alive.
        unsafe { span.write(0, &frame) };
        assert!(driver.add(&[(at, frame.len() as u32)], &[], 0).expect("a legal chain"));
        driver.publish();
    };
    let mut forwarder = Forwarder::new();
    forwarder.bounds.most = u64::MAX;
    let source = SourceId { port: 0, queue: 0 };
    let enable = |fabric: &Fabric, enabled| {
        if let Input::Vhost(input) = &mut fabric.port(0).expect("there").inputs[0].state.lock().input {
            input.set_enabled(enabled);
        }
    };
    let swallowed = |fabric: &Fabric| fabric.port(2).expect("there").outputs[0].counters.frames.get();

    send(1);
    send(2);
    assert_eq!(forwarder.forward(&fabric, source), Progress::Waiting);
    assert_eq!(swallowed(&fabric), 1, "the second overtakes the first");
    enable(&fabric, false);
    assert_eq!(forwarder.forward(&fabric, source), Progress::Moved(2));
    let dropped = &fabric.port(0).expect("there").inputs[0].counters.drops[DropReason::QueueDisabled as usize];
    assert_eq!(dropped.get(), 1, "one of them was delivered");
    enable(&fabric, true);
    send(2);
    send(2);
    assert_eq!(forwarder.forward(&fabric, source), Progress::Moved(2));
    assert_eq!(swallowed(&fabric), 3);
}

#[test]
fn a_source_whose_buffer_is_unmapped_while_it_waits_gives_back_what_was_delivered() {
    for patient in [false, true] {
        const PAGE: u64 = 0x1000;
        let signal = std::fs::File::options().write(true).open("/dev/null").expect("it is there").into();
        let iotlb = Arc::new(Iotlb::new(signal));
        iotlb.update(Translation::new(0, 1 << 20, 0, 3).expect("a legal translation"));
        let (memory, mut driver, mut sender) = queue();
        let config = *sender.queue.config();
        sender.queue = DeviceQueue::new(memory.behind(iotlb.clone()), &config).expect("a legal queue");
        let (_, _, full) = queue();
        let macs = Arc::new(MacTable::new());
        let mut fabric = Fabric::new(1, macs.clone());
        fabric.ports = vec![
            port(0, Input::Vhost(Box::new(VhostInput::new(sender))), Output::Down),
            port(1, Input::Stopped, Output::Vhost(Box::new(VhostOutput::new(full)))),
            port(2, Input::Stopped, Output::Null(Null)),
        ];
        for station in [1, 2] {
            macs.learn(macs.key(u64::from_le_bytes([2, 0, 0, 0, 0, station, 0, 0]), 0), station.into());
        }
        // Two for the one that has no room, in a page of their own, then some that overtake them.
        for (number, station) in [1, 1, 2, 2, 2].into_iter().enumerate() {
            let frame = [&[0; 12][..], &[2, 0, 0, 0, 0, station], &[2, 0, 0, 0, 0, 9], &[0; 48]].concat();
            let at = 0x10000 + PAGE * u64::from(station) + 0x100 * number as u64;
            let span = memory.translate(&mut RegionCache::default(), at, frame.len() as u32).expect("in memory");
            // SAFETY: `memory` is alive.
            unsafe { span.write(0, &frame) };
            assert!(driver.add(&[(at, frame.len() as u32)], &[], number as u64).expect("a legal chain"));
        }
        driver.publish();
        let mut forwarder = Forwarder::new();
        forwarder.bounds.most = u64::MAX;
        let source = SourceId { port: 0, queue: 0 };
        assert_eq!(forwarder.forward(&fabric, source), Progress::Waiting);
        let swallowed = || fabric.port(2).expect("there").outputs[0].counters.frames.get();
        assert_eq!(swallowed(), 3);
        let (first, last) = (0x10000 + PAGE, 0x10000 + 2 * PAGE - 1);
        iotlb.invalidate(first, last);
        if let Input::Vhost(input) = &mut fabric.port(0).expect("there").inputs[0].state.lock().input {
            input.queue().translations_removed(first, last);
        }
        forwarder.settle(&fabric, source, patient);
        let given_back: Vec<_> = std::iter::from_fn(|| driver.take().expect("a legal ring")).collect();
        assert_eq!(given_back.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(swallowed(), 3, "each once");
        let dropped = &fabric.port(0).expect("there").inputs[0].counters.drops[DropReason::Iommu as usize];
        assert_eq!(dropped.get(), 2);
    }
}

#[test]
fn a_receiver_without_checksum_offload_is_not_told_of_checksums() {
    // A socket in place of an interface: each message is a frame.
    let (near, far) = std::os::unix::net::UnixDatagram::pair().expect("sockets");
    let (input, _) = crate::tap::open(near.into()).expect("it can be made non-blocking");
    let (memory, mut driver, receiver) = queue();
    driver.add(&[], &[(0x10000, 2048)], 0).expect("a legal buffer");
    driver.publish();
    let mut fabric = Fabric::new(1, Arc::new(MacTable::new()));
    fabric.ports = vec![
        port(0, Input::Tap(Box::new(input)), Output::Down),
        port(1, Input::Stopped, Output::Vhost(Box::new(VhostOutput::new(receiver)))),
    ];
    let header = NetHeader { flags: net_header::DATA_VALID, ..NetHeader::default() };
    let frame = [&header.encode()[..], &[0xff; 6], &[2, 0, 0, 0, 0, 1], &[0; 48]].concat();
    far.send(&frame).expect("there is room");
    assert_eq!(Forwarder::new().forward(&fabric, SourceId { port: 0, queue: 0 }), Progress::Moved(1));
    assert_eq!(driver.take().expect("a legal ring"), Some((0, 72)));
    let span = memory.translate(&mut RegionCache::default(), 0x10000, 1).expect("in memory");
    let mut flags = [0xff];
    // SAFETY: `memory` is alive.
    unsafe { span.read(0, &mut flags) };
    assert_eq!(flags, [0]);
    let completed = &fabric.port(1).expect("there").outputs[0].counters.completed_offloads;
    assert_eq!(completed.get(), 0, "there was nothing to do");
}

#[test]
fn a_visit_takes_so_many_bytes_and_says_that_there_is_more() {
    let (memory, mut driver, sender) = queue();
    let mut fabric = Fabric::new(1, Arc::new(MacTable::new()));
    fabric.ports = vec![
        port(0, Input::Vhost(Box::new(VhostInput::new(sender))), Output::Down),
        port(1, Input::Stopped, Output::Null(Null)),
    ];
    let start = [&[0; 12][..], &[0xff; 6], &[2, 0, 0, 0, 0, 1], &[0; 48]].concat();
    let span = memory.translate(&mut RegionCache::default(), 0x10000, start.len() as u32).expect("in memory");
    // SAFETY: `memory` is alive.
    unsafe { span.write(0, &start) };
    for _ in 0..10 {
        assert!(driver.add(&[(0x10000, 65_000)], &[], 0).expect("a legal chain"));
    }
    driver.publish();
    let (mut forwarder, source) = (Forwarder::new(), SourceId { port: 0, queue: 0 });
    let each = u64::from(65_000u32 - 12);
    let fit = turns::VISIT.div_ceil(each) as usize;
    assert_eq!(forwarder.forward(&fabric, source), Progress::Moved(fit));
    let (cost, more) = forwarder.take_cost();
    assert!(more && cost >= fit as u64 * each, "{cost}");
    assert_eq!(forwarder.forward(&fabric, source), Progress::Moved(fit));
    assert_eq!(forwarder.forward(&fabric, source), Progress::Idle);
}

#[test]
fn a_rate_lets_through_what_is_paid_for() {
    let (memory, mut driver, sender) = queue();
    let mut fabric = Fabric::new(1, Arc::new(MacTable::new()));
    fabric.ports = vec![
        port(0, Input::Vhost(Box::new(VhostInput::new(sender))), Output::Down),
        port(1, Input::Stopped, Output::Null(Null)),
    ];
    // Three at once, then one a second.
    let rate = crate::policer::Rate { bits: 0, frames: 1, burst: 3_000_000 };
    let rules = crate::admission::Rules { rate, ..Default::default() };
    fabric.ports[0].as_mut().expect("there").admission = Admission::new(&rules);
    let frame = [&[0; 12][..], &[0xff; 6], &[2, 0, 0, 0, 0, 1], &[0; 48]].concat();
    let span = memory.translate(&mut RegionCache::default(), 0x10000, frame.len() as u32).expect("in memory");
    // SAFETY: `memory` is alive.
    unsafe { span.write(0, &frame) };
    for _ in 0..10 {
        assert!(driver.add(&[(0x10000, frame.len() as u32)], &[], 0).expect("a legal chain"));
    }
    driver.publish();
    let (mut forwarder, source) = (Forwarder::new(), SourceId { port: 0, queue: 0 });
    assert_eq!(forwarder.forward(&fabric, source), Progress::Moved(3));
    assert!(!forwarder.take_cost().1, "what may not go on is not waiting for a turn");
    // A part of a token opens the bucket for one more; unless each look takes a second, the next is too early.
    let mut moved = 3;
    while let Progress::Moved(more) = forwarder.forward(&fabric, source) {
        moved += more;
    }
    assert!(moved < 10);
    assert!(matches!(forwarder.forward(&fabric, source), Progress::Throttled(_) | Progress::Moved(1)));
}
