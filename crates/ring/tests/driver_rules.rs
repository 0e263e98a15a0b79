//! The driver against a device that breaks the rules, or uses the freedom they give it.

mod rig;

use rig::{DATA, Rig, config};
use viaduct_ring::{DriverQueue, Layout, QueueConfig, RingError};

const WRITE: u16 = 2;
/// A used descriptor of the first lap.
const USED: u16 = 1 << 7 | 1 << 15;

/// The device uses split elements (id, written) from place `at` of the used ring on, and moves `idx`.
fn use_split(rig: &Rig, config: &QueueConfig, at: u16, elements: &[(u32, u32)], idx: u16) {
    for (i, (id, written)) in elements.iter().enumerate() {
        let place = config.device_addr + 4 + 8 * ((u64::from(at) + i as u64) % u64::from(config.size));
        rig.put(place, id.to_le_bytes());
        rig.put(place + 4, written.to_le_bytes());
    }
    rig.put(config.device_addr + 2, idx.to_le_bytes());
}

/// The device writes a used descriptor into place `at` of a packed ring.
fn use_packed(rig: &Rig, config: &QueueConfig, at: u64, id: u16, written: u32) {
    rig.packed_descriptor(config.descriptor_addr, at, 0, written, id, USED | if written > 0 { WRITE } else { 0 });
}

/// Two buffers, of 1 readable and of 10 writable bytes, with tokens 100 and 101 and ids 0 and 1.
fn two(layout: Layout, in_order: bool) -> (Rig, QueueConfig) {
    let config = QueueConfig { in_order, ..config(layout, 4) };
    let mut rig = Rig::new(&config);
    assert_eq!(rig.driver.add(&[(DATA, 1)], &[], 100), Ok(true));
    assert_eq!(rig.driver.add(&[], &[(DATA, 10)], 101), Ok(true));
    rig.driver.publish();
    (rig, config)
}

/// The outcome of one used element in each layout, after which the queue has to be broken.
fn answer(id: u16, written: u32) -> [RingError; 2] {
    [Layout::Split, Layout::Packed].map(|layout| {
        let (mut rig, config) = two(layout, false);
        match layout {
            Layout::Split => use_split(&rig, &config, 0, &[(id.into(), written)], 1),
            Layout::Packed => use_packed(&rig, &config, 0, id, written),
        }
        let error = rig.driver.take().unwrap_err();
        assert_eq!(rig.driver.take(), Err(error.clone()), "broken for good");
        assert_eq!(rig.driver.take_many(&mut Vec::new(), 1), Err(error.clone()));
        error
    })
}

#[test]
fn a_used_buffer_is_one_the_device_holds() {
    for id in [2, 3, 4, 5, 65535] {
        for error in answer(id, 0) {
            assert_eq!(error, RingError::NotOutstanding { found: id.into() });
        }
    }
    // 32 bits of id in a split ring.
    let (mut rig, config) = two(Layout::Split, false);
    use_split(&rig, &config, 0, &[(65536, 0)], 1);
    assert_eq!(rig.driver.take(), Err(RingError::NotOutstanding { found: 65536 }));
}

#[test]
fn a_buffer_is_used_once() {
    for layout in [Layout::Split, Layout::Packed] {
        let (mut rig, config) = two(layout, false);
        match layout {
            Layout::Split => use_split(&rig, &config, 0, &[(1, 4), (1, 4)], 2),
            Layout::Packed => {
                use_packed(&rig, &config, 0, 1, 4);
                use_packed(&rig, &config, 1, 1, 4);
            }
        }
        let mut used = Vec::new();
        assert_eq!(rig.driver.take_many(&mut used, 8), Ok(1), "the good one is delivered first");
        assert_eq!(used, [(101, 4)]);
        assert_eq!(rig.driver.take_many(&mut used, 8), Err(RingError::NotOutstanding { found: 1 }));
    }
}

#[test]
fn no_more_is_written_than_there_is_room_for() {
    for error in answer(1, 11) {
        assert_eq!(error, RingError::UsedLength { id: 1, found: 11, allowed: 10 });
    }
    for error in answer(0, 1) {
        assert_eq!(error, RingError::UsedLength { id: 0, found: 1, allowed: 0 });
    }
    // Packed: without WRITE the length means nothing (2.8.4).
    let (mut rig, config) = two(Layout::Packed, false);
    rig.packed_descriptor(config.descriptor_addr, 0, 0, 12345, 0, USED);
    assert_eq!(rig.driver.take(), Ok(Some((100, 0))));
}

#[test]
fn no_more_is_used_than_was_made_available() {
    for idx in [3u16, 4, 32768, 65535] {
        let (mut rig, config) = two(Layout::Split, false);
        // Staged buffers are not the device's yet.
        rig.driver.add(&[(DATA, 1)], &[], 102).unwrap();
        use_split(&rig, &config, 0, &[(0, 0), (1, 0), (2, 0), (3, 0)], idx);
        assert_eq!(rig.driver.take(), Err(RingError::UsedJump { found: idx.into(), allowed: 2 }));
    }
}

#[test]
fn one_used_element_may_return_a_batch_when_in_order_was_negotiated() {
    // 2.7.9 and 2.8.8: only the last of a batch has an element, at the place of the first; the others count as
    // completely written.
    for layout in [Layout::Split, Layout::Packed] {
        let config = QueueConfig { in_order: true, ..config(layout, 8) };
        let mut rig = Rig::new(&config);
        assert_eq!(rig.driver.add(&[], &[(DATA, 10)], 100), Ok(true));
        assert_eq!(rig.driver.add(&[(DATA, 1), (DATA, 1)], &[(DATA, 20)], 101), Ok(true));
        assert_eq!(rig.driver.add(&[], &[(DATA, 30)], 102), Ok(true));
        assert_eq!(rig.driver.add(&[(DATA, 1)], &[], 103), Ok(true));
        rig.driver.publish();
        match layout {
            // Heads 0, 1 to 3, 4, 5.
            Layout::Split => use_split(&rig, &config, 0, &[(4, 7)], 3),
            Layout::Packed => use_packed(&rig, &config, 0, 2, 7),
        }
        assert_eq!(rig.driver.take(), Ok(Some((100, 10))));
        assert_eq!(rig.driver.free(), 3);
        assert_eq!(rig.driver.take(), Ok(Some((101, 20))));
        assert_eq!(rig.driver.take(), Ok(Some((102, 7))));
        assert_eq!(rig.driver.take(), Ok(None));
        match layout {
            Layout::Split => use_split(&rig, &config, 3, &[(5, 0)], 4),
            // Five descriptors on.
            Layout::Packed => use_packed(&rig, &config, 5, 3, 0),
        }
        assert_eq!(rig.driver.take(), Ok(Some((103, 0))));
        assert_eq!(rig.driver.free(), 8);
    }
}

#[test]
fn a_batch_is_no_longer_than_the_index_says() {
    let (mut rig, config) = two(Layout::Split, true);
    use_split(&rig, &config, 0, &[(1, 0)], 1);
    assert_eq!(rig.driver.take(), Err(RingError::UsedJump { found: 2, allowed: 1 }));
}

#[test]
fn buffers_that_could_never_be_added_are_refused() {
    for layout in [Layout::Split, Layout::Packed] {
        let config = config(layout, 4);
        let mut rig = Rig::new(&config);
        assert_eq!(rig.driver.add(&[], &[], 1), Err(RingError::Segments { found: 0, allowed: 4 }));
        let five = [(DATA, 1); 5];
        assert_eq!(rig.driver.add(&five, &[], 1), Err(RingError::Segments { found: 5, allowed: 4 }));
        let long = [(DATA, u32::MAX), (DATA, 1)];
        assert_eq!(rig.driver.add(&long, &[], 1), Err(RingError::TotalLength { found: 1 << 32 }));
        assert_eq!(rig.driver.add(&long[..1], &[], 1), Ok(true), "the queue stays as it was");
        assert_eq!(rig.driver.free(), 3);
        // With tables, more elements than the queue has descriptors.
        let mut rig = Rig::new(&QueueConfig { indirect: true, ..config });
        assert_eq!(rig.driver.add(&five, &[(DATA, 9)], 1), Ok(true));
        assert_eq!(rig.driver.free(), 3);
    }
}

#[test]
fn the_area_of_indirect_tables_is_checked() {
    let mut rig = Rig::new(&config(Layout::Split, 4));
    let outside = RingError::IndirectAddress { addr: 1 << 40, len: 4096 };
    assert_eq!(rig.driver.set_indirect_area(1 << 40, 4096), Err(outside));
    assert!(matches!(rig.driver.set_indirect_area(rig::TABLES + 8, 4096), Err(RingError::Alignment { .. })));
    // Room for two descriptors in each table: three go into a chain.
    rig.driver.set_indirect_area(rig::TABLES, 4 * 2 * 16).unwrap();
    assert_eq!(rig.driver.add(&[(DATA, 1); 2], &[], 1), Ok(true));
    assert_eq!(rig.driver.free(), 3);
    assert_eq!(rig.driver.add(&[(DATA, 1); 3], &[], 1), Ok(true));
    assert_eq!(rig.driver.free(), 0);
    assert_eq!(rig.driver.add(&[(DATA, 1)], &[], 1), Ok(false));
}

#[test]
fn a_driver_starts_with_nothing_outstanding() {
    let memory = rig::memory();
    for base in [0x8001_8000, 0x8000_0000, 0x8004_8004] {
        let config = QueueConfig { base, ..config(Layout::Packed, 4) };
        let error = DriverQueue::new(memory.clone(), &config).map(|_| ()).unwrap_err();
        assert_eq!(error, RingError::Base { found: base, size: 4 });
    }
}
