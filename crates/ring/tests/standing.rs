//! A packed ring whose position nobody remembers: what a front-end says after its back-end was killed.

mod rig;

use proptest::prelude::*;
use rig::{DATA, Rig, config};
use viaduct_ring::{Batch, DeviceQueue, Layout, PACKED_START, QueueConfig};

#[derive(Clone, Debug)]
enum Step {
    /// The driver adds a buffer of so many elements, and perhaps publishes.
    Add(usize, bool),
    /// The device takes, uses and publishes up to so many.
    Serve(usize),
    /// The driver takes back up to so many.
    Take(usize),
    /// The device is replaced by one that is told the right base, or that of a new ring.
    Restart(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1usize..4, any::<bool>()).prop_map(|(count, publish)| Step::Add(count, publish)),
        3 => (1usize..20).prop_map(Step::Serve),
        3 => (1usize..20).prop_map(Step::Take),
        1 => any::<bool>().prop_map(Step::Restart),
    ];
    prop::collection::vec(step, 10..300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn a_new_device_finds_its_place(size in 1u32..24, steps in steps()) {
        let config = config(Layout::Packed, size);
        let mut rig = Rig::new(&config);
        let (mut added, mut expected, mut returned) = (0u64, 0u64, 0u64);
        let mut staged = 0;
        for step in steps {
            match step {
                Step::Add(count, publish) => {
                    let count = count.min(size as usize);
                    let elements: Vec<_> = (0..count as u64).map(|i| (DATA + 64 * (added % 1000) + i, 1)).collect();
                    if rig.driver.add(&elements, &[], added).unwrap() {
                        added += 1;
                        staged += count;
                    }
                    if publish {
                        rig.driver.publish();
                        staged = 0;
                    }
                }
                Step::Serve(most) => {
                    let mut batch = Batch::default();
                    rig.device.peek(&mut batch, most).unwrap();
                    for chain in &batch.chains {
                        let first = batch.readable(chain)[0].as_ptr();
                        prop_assert_eq!(first, rig.span(DATA + 64 * (expected % 1000), 1).as_ptr());
                        expected += 1;
                    }
                    rig.device.consume(&batch.chains);
                    rig.device.complete_all(&batch.chains);
                    rig.device.publish();
                }
                Step::Take(most) => {
                    let mut used = Vec::new();
                    rig.driver.take_many(&mut used, most).unwrap();
                    for (token, _) in used {
                        prop_assert_eq!(token, returned);
                        returned += 1;
                    }
                }
                Step::Restart(told) => {
                    // The driver may be in the middle of a batch, unless that is the whole ring.
                    if staged == size as usize {
                        rig.driver.publish();
                        staged = 0;
                    }
                    let right = rig.device.base();
                    let base = if told { right } else { PACKED_START };
                    rig.device = DeviceQueue::new(rig.memory.clone(), &QueueConfig { base, ..config }).unwrap();
                    prop_assert_eq!(rig.device.base(), right);
                }
            }
        }
    }
}

/// One buffer is made available, used and taken back.
fn there_and_back(rig: &mut Rig, token: u64) {
    rig.driver.add(&[(DATA, 1)], &[], token).unwrap();
    rig.driver.publish();
    let mut batch = Batch::default();
    assert_eq!(rig.device.peek(&mut batch, 8), Ok(1));
    rig.device.consume(&batch.chains);
    rig.device.complete_all(&batch.chains);
    rig.device.publish();
    rig.driver.take().unwrap().unwrap();
}

#[test]
fn an_old_base_is_seen_through() {
    let config = config(Layout::Packed, 8);
    let mut rig = Rig::new(&config);
    let mut old = Vec::new();
    for round in 0..40 {
        there_and_back(&mut rig, round);
        let right = rig.device.base();
        // Positions repeat every two laps; those of the last lap can be told from now.
        for &base in old.iter().rev().take(7) {
            let device = DeviceQueue::new(rig.memory.clone(), &QueueConfig { base, ..config }).unwrap();
            assert_eq!(device.base(), right, "round {round}, told {base:#x}");
        }
        old.push(right);
    }
}

#[test]
fn an_old_base_among_buffers_that_wait_is_seen_through() {
    // The base is that of the first lap, two laps ago; meanwhile the driver waits with buffers on both sides of it.
    let config = config(Layout::Packed, 8);
    let mut rig = Rig::new(&config);
    let mut old = PACKED_START;
    for round in 0..13 {
        there_and_back(&mut rig, round);
        if round == 0 {
            old = rig.device.base();
        }
    }
    let right = rig.device.base();
    for token in 13..19 {
        rig.driver.add(&[(DATA, 1)], &[], token).unwrap();
        rig.driver.publish();
        let device = DeviceQueue::new(rig.memory.clone(), &QueueConfig { base: old, ..config }).unwrap();
        assert_eq!(device.base(), right, "the driver is at {}", token + 1);
    }
}

#[test]
fn what_the_front_end_used_in_the_wrong_place_is_passed_over() {
    // QEMU drops what a guest sends while the link is down, from where it believes a packed ring to stand: its beginning.
    const AVAIL_AND_USED: u16 = 1 << 7 | 1 << 15;
    for base in [PACKED_START, 0x8002_8002] {
        let config = QueueConfig { base, ..config(Layout::Packed, 8) };
        let mut rig = Rig::new(&QueueConfig { base: PACKED_START, ..config });
        for token in 0..13 {
            rig.driver.add(&[(DATA, 1)], &[], token).unwrap();
            rig.driver.publish();
            let mut batch = Batch::default();
            assert_eq!(rig.device.peek(&mut batch, 8), Ok(1));
            rig.device.consume(&batch.chains);
            rig.device.complete_all(&batch.chains);
            rig.device.publish();
            rig.driver.take().unwrap().unwrap();
        }
        for token in 13..19 {
            rig.driver.add(&[(DATA, 1)], &[], token).unwrap();
        }
        rig.driver.publish();
        for index in 0..2 {
            rig.put(config.descriptor_addr + 16 * index + 14, AVAIL_AND_USED.to_le_bytes());
        }
        rig.device = DeviceQueue::new(rig.memory.clone(), &config).unwrap();
        let mut batch = Batch::default();
        assert_eq!(rig.device.peek(&mut batch, 8), Ok(1), "what lies behind");
        for token in 13..18 {
            assert_eq!(rig.driver.take().unwrap().map(|(token, _)| token), Some(token), "before and dropped");
        }
        assert_eq!(rig.driver.take(), Ok(None));
        rig.device.consume(&batch.chains);
        rig.device.complete_all(&batch.chains);
        rig.device.publish();
        assert_eq!(rig.driver.take().unwrap().map(|(token, _)| token), Some(18));
    }
}

#[test]
fn a_driver_in_the_middle_of_its_first_batch_is_not_misread() {
    // All but the first descriptor of the batch are marked already.
    for count in [2, 5, 8] {
        let mut rig = Rig::new(&config(Layout::Packed, 8));
        for i in 0..count {
            rig.driver.add(&[(DATA + i, 1)], &[], i).unwrap();
        }
        let device = DeviceQueue::new(rig.memory.clone(), &config(Layout::Packed, 8)).unwrap();
        assert_eq!(device.base(), PACKED_START, "{count} descriptors");
    }
}

#[test]
fn what_a_killed_device_did_not_show_comes_back_empty() {
    for start in 0..20 {
        let config = config(Layout::Packed, 5);
        let mut rig = Rig::new(&config);
        for token in 0..start {
            rig.driver.add(&[], &[(DATA, 100)], token).unwrap();
            rig.driver.publish();
            let mut batch = Batch::default();
            assert_eq!(rig.device.peek(&mut batch, 1), Ok(1));
            rig.device.consume(&batch.chains);
            rig.device.complete(&batch.chains[0], 60);
            rig.device.publish();
            assert_eq!(rig.driver.take(), Ok(Some((token, 60))));
        }
        for token in 0..4 {
            rig.driver.add(&[], &[(DATA, 100)], token).unwrap();
        }
        rig.driver.publish();
        let mut batch = Batch::default();
        assert_eq!(rig.device.peek(&mut batch, 3), Ok(3));
        for chain in &batch.chains {
            rig.device.complete(chain, 60);
        }
        rig.device = DeviceQueue::new(rig.memory.clone(), &config).unwrap();
        batch.clear();
        assert_eq!(rig.device.peek(&mut batch, 8), Ok(1), "only the fourth can be used");
        let mut used = Vec::new();
        rig.driver.take_many(&mut used, 8).unwrap();
        assert_eq!(used, [(0, 0), (1, 0), (2, 0)]);
    }
}

#[test]
fn a_device_killed_between_using_and_publishing_loses_no_buffer() {
    for start in 0..20 {
        let config = config(Layout::Packed, 9);
        let mut rig = Rig::new(&config);
        let serve = |rig: &mut Rig, publish: bool| {
            let mut batch = Batch::default();
            rig.device.peek(&mut batch, 3).unwrap();
            rig.device.consume(&batch.chains);
            rig.device.complete_all(&batch.chains);
            if publish {
                rig.device.publish();
            }
            batch.chains.len()
        };
        for _ in 0..start {
            rig.driver.add(&[(DATA, 1)], &[], 7).unwrap();
            rig.driver.publish();
            assert_eq!(serve(&mut rig, true), 1);
            rig.driver.take().unwrap().unwrap();
        }
        for token in 0..4 {
            assert_eq!(rig.driver.add(&[(DATA, 1), (DATA, 1)], &[], token), Ok(true));
        }
        rig.driver.publish();
        assert_eq!(serve(&mut rig, false), 3);
        // The first three are given up, the fourth is still to be served.
        rig.device = DeviceQueue::new(rig.memory.clone(), &config).unwrap();
        assert_eq!(serve(&mut rig, true), 1);
        let mut used = Vec::new();
        assert_eq!(rig.driver.take_many(&mut used, 9), Ok(4));
        assert_eq!(used, [(0, 0), (1, 0), (2, 0), (3, 0)]);
        assert_eq!((rig.driver.free(), rig.device.base()), (9, rig.driver.base()));
    }
}
