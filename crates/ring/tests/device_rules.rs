//! The device against hand-written rings, section by section of virtio 1.2.

mod rig;

use rig::{DATA, Rig, TABLES, config};
use viaduct_memory::{GuestMemory, RegionSpec, memfd};
use viaduct_ring::{Batch, DeviceQueue, Layout, PACKED_START, QueueConfig, RingError};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// An available descriptor of the first lap.
const AVAIL: u16 = 1 << 7;

/// A descriptor without its layout: address, length, flags, next (split) or id (packed).
type Raw = (u64, u32, u16, u16);

/// Lengths of readable and of writable spans.
type Spans = (Vec<u32>, Vec<u32>);

/// A queue with the feature bits that the tests are about.
fn rig(layout: Layout, size: u32) -> Rig {
    Rig::new(&QueueConfig { indirect: true, ..config(layout, size) })
}

/// Makes one split chain available: descriptors from index 0 on.
fn offer_split(rig: &Rig, config: &QueueConfig, descriptors: &[Raw]) {
    for (i, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
        rig.split_descriptor(config.descriptor_addr, i as u64, addr, len, flags, next);
    }
    rig.put(config.driver_addr + 4, 0u16.to_le_bytes());
    rig.put(config.driver_addr + 2, 1u16.to_le_bytes());
}

/// Makes packed descriptors available.
fn offer_packed(rig: &Rig, config: &QueueConfig, descriptors: &[Raw]) {
    for (i, &(addr, len, flags, id)) in descriptors.iter().enumerate() {
        rig.packed_descriptor(config.descriptor_addr, i as u64, addr, len, id, flags | AVAIL);
    }
}

/// What the device makes of these descriptors.
fn outcome(layout: Layout, size: u32, descriptors: &[Raw], tables: &[Raw]) -> Result<Spans, RingError> {
    let mut rig = rig(layout, size);
    let config = config(layout, size);
    for (i, &(addr, len, flags, other)) in tables.iter().enumerate() {
        match layout {
            Layout::Split => rig.split_descriptor(TABLES, i as u64, addr, len, flags, other),
            Layout::Packed => rig.packed_descriptor(TABLES, i as u64, addr, len, other, flags),
        }
    }
    match layout {
        Layout::Split => offer_split(&rig, &config, descriptors),
        Layout::Packed => offer_packed(&rig, &config, descriptors),
    }
    let mut batch = Batch::default();
    let found = rig.device.peek(&mut batch, 8);
    match found {
        Ok(found) => {
            assert_eq!(found, 1);
            let chain = batch.chains[0];
            let lengths = |spans: &[viaduct_memory::Span]| spans.iter().map(|span| span.len()).collect::<Vec<_>>();
            assert_eq!(u64::from(chain.readable_len), batch.readable(&chain).iter().map(|s| u64::from(s.len())).sum());
            Ok((lengths(batch.readable(&chain)), lengths(batch.writable(&chain))))
        }
        Err(error) => {
            assert!(batch.chains.is_empty() && batch.spans.is_empty());
            assert_eq!(rig.device.peek(&mut batch, 8), Err(error.clone()), "broken for good");
            assert_eq!(rig.device.broken(), Some(&error));
            Err(error)
        }
    }
}

fn both(descriptors: &[Raw], tables: &[Raw]) -> [Result<Spans, RingError>; 2] {
    [outcome(Layout::Split, 4, descriptors, tables), outcome(Layout::Packed, 4, descriptors, tables)]
}

#[test]
fn readable_elements_come_before_writable_ones() {
    // 2.7.4.2 and 2.8.17
    let good = [(DATA, 1, NEXT, 1), (DATA, 2, NEXT, 2), (DATA, 3, NEXT | WRITE, 3), (DATA, 4, WRITE, 0)];
    for result in both(&good, &[]) {
        assert_eq!(result, Ok((vec![1, 2], vec![3, 4])));
    }
    let bad = [(DATA, 1, NEXT | WRITE, 1), (DATA, 2, 0, 0)];
    for result in both(&bad, &[]) {
        assert_eq!(result, Err(RingError::Order));
    }
    // Length zero is no excuse.
    let bad = [(DATA, 0, NEXT | WRITE, 1), (DATA, 2, 0, 0)];
    for result in both(&bad, &[]) {
        assert_eq!(result, Err(RingError::Order));
    }
}

#[test]
fn an_element_without_bytes_has_no_span_and_no_address() {
    for result in both(&[(u64::MAX, 0, NEXT, 1), (DATA, 7, NEXT, 2), (0, 0, WRITE, 0)], &[]) {
        assert_eq!(result, Ok((vec![7], vec![])));
    }
    for result in both(&[(u64::MAX, 0, WRITE, 0)], &[]) {
        assert_eq!(result, Ok((vec![], vec![])));
    }
}

#[test]
fn buffers_lie_in_guest_memory() {
    let end = TABLES + u64::from(rig::TABLES_LEN);
    for (addr, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 4), (1 << 40, 4096), (0, u32::MAX)] {
        for result in both(&[(addr, len, 0, 0)], &[]) {
            assert!(matches!(result, Err(RingError::Address { .. })), "{addr:#x} {len}: {result:?}");
        }
        for result in both(&[(DATA, 1, NEXT, 1), (addr, len, WRITE, 0)], &[]) {
            assert!(matches!(result, Err(RingError::Address { .. })), "{addr:#x} {len}: {result:?}");
        }
    }
    for result in both(&[(end - 1, 1, 0, 0)], &[]) {
        assert_eq!(result, Ok((vec![1], vec![])));
    }
}

#[test]
fn a_chain_is_no_longer_than_the_queue() {
    // 2.7.5.2: "this implies that loops are forbidden"
    let full = [(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 2), (DATA, 1, NEXT, 3), (DATA, 1, 0, 0)];
    for result in both(&full, &[]) {
        assert_eq!(result, Ok((vec![1; 4], vec![])));
    }
    for looped in [vec![(DATA, 1, NEXT, 0)], vec![(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)]] {
        assert_eq!(outcome(Layout::Split, 4, &looped, &[]), Err(RingError::ChainLength { allowed: 4 }));
    }
    // A packed list cannot go back, but round: 2.8.17.
    let round = [(DATA, 1, NEXT, 0); 4];
    assert_eq!(outcome(Layout::Packed, 4, &round, &[]), Err(RingError::ChainLength { allowed: 4 }));
    // Nor may it run into a list before it, which is still outstanding.
    let rig_config = config(Layout::Packed, 4);
    let mut rig = rig(Layout::Packed, 4);
    offer_packed(&rig, &rig_config, &[(DATA, 1, NEXT, 0), (DATA, 1, NEXT, 0), (DATA, 1, 0, 0), (DATA, 1, NEXT, 1)]);
    assert_eq!(rig.device.peek(&mut Batch::default(), 8), Ok(1));
    assert_eq!(rig.device.peek(&mut Batch::default(), 8), Err(RingError::ChainLength { allowed: 1 }));
    // 2.8.6: all of a list is available once its first descriptor is.
    assert_eq!(outcome(Layout::Packed, 4, &round[..3], &[]), Err(RingError::NotAvailable { index: 3 }));
}

#[test]
fn indexes_lie_in_the_table() {
    for next in [4, 5, 65535] {
        let chain = [(DATA, 1, NEXT, next)];
        assert_eq!(outcome(Layout::Split, 4, &chain, &[]), Err(RingError::Index { found: next, allowed: 4 }));
        let config = config(Layout::Split, 4);
        let mut rig = rig(Layout::Split, 4);
        rig.put(config.driver_addr + 4, next.to_le_bytes());
        rig.put(config.driver_addr + 2, 1u16.to_le_bytes());
        let error = rig.device.peek(&mut Batch::default(), 1);
        assert_eq!(error, Err(RingError::Index { found: next, allowed: 4 }));
    }
}

#[test]
fn no_more_is_available_than_the_queue_holds() {
    let config = config(Layout::Split, 4);
    for (idx, allowed) in [(4u16, true), (5, false), (32768, false), (65535, false)] {
        let mut rig = rig(Layout::Split, 4);
        for i in 0..4 {
            rig.split_descriptor(config.descriptor_addr, i, DATA, 1, 0, 0);
        }
        rig.put(config.driver_addr + 2, idx.to_le_bytes());
        let result = rig.device.peek(&mut Batch::default(), 100);
        let expected = if allowed { Ok(4) } else { Err(RingError::AvailableJump { found: idx.into(), allowed: 4 }) };
        assert_eq!(result, expected);
    }
}

#[test]
fn a_packed_ring_gives_no_more_than_it_has() {
    // The driver goes on marking descriptors available although the device holds all of them.
    let config = config(Layout::Packed, 2);
    let mut rig = rig(Layout::Packed, 2);
    offer_packed(&rig, &config, &[(DATA, 1, 0, 0), (DATA, 1, 0, 1)]);
    let mut batch = Batch::default();
    assert_eq!(rig.device.peek(&mut batch, 8), Ok(2));
    rig.device.consume(&batch.chains);
    for i in 0..2 {
        // Available in the second lap: USED set, AVAIL not.
        rig.packed_descriptor(config.descriptor_addr, i, DATA, 1, 7, 1 << 15);
    }
    assert_eq!(rig.device.peek(&mut batch, 8), Ok(0));
    assert!(!rig.device.enable_notifications());
    // A list that runs into what is outstanding is too long for the room there is.
    rig.device.complete(&batch.chains[0], 0);
    rig.device.publish();
    rig.packed_descriptor(config.descriptor_addr, 0, DATA, 1, 7, 1 << 15 | NEXT);
    assert_eq!(rig.device.peek(&mut batch, 8), Err(RingError::ChainLength { allowed: 1 }));
}

#[test]
fn chains_before_a_bad_one_are_delivered_first() {
    let config = config(Layout::Split, 4);
    let mut rig = rig(Layout::Split, 4);
    rig.split_descriptor(config.descriptor_addr, 0, DATA, 10, 0, 0);
    rig.split_descriptor(config.descriptor_addr, 1, DATA, 20, NEXT, 2);
    rig.split_descriptor(config.descriptor_addr, 2, 1 << 50, 20, 0, 2);
    for (i, head) in [0u16, 0, 1, 0].into_iter().enumerate() {
        rig.put(config.driver_addr + 4 + 2 * i as u64, head.to_le_bytes());
    }
    rig.put(config.driver_addr + 2, 4u16.to_le_bytes());
    let mut batch = Batch::default();
    assert_eq!(rig.device.peek(&mut batch, 8), Ok(2));
    assert_eq!((batch.chains.len(), batch.spans.len()), (2, 2), "nothing of the bad chain is left");
    rig.device.consume(&batch.chains);
    rig.device.complete_all(&batch.chains);
    assert!(rig.device.publish());
    assert_eq!(rig.get_u16(config.device_addr + 2), 2);
    let error = Err(RingError::Address { addr: 1 << 50, len: 20 });
    assert_eq!(rig.device.peek(&mut batch, 8), error);
    assert_eq!(rig.device.peek(&mut batch, 0), error);
}

#[test]
fn indirect_tables() {
    // 2.7.5.3 and 2.8.7: in a split table the order is given by `next`, in a packed one by place.
    let table = [(DATA, 1, NEXT, 2), (DATA, 3, WRITE, 0), (DATA, 2, NEXT, 1)];
    let head = [(TABLES, 48, INDIRECT | WRITE, 0)];
    assert_eq!(outcome(Layout::Split, 2, &head, &table), Ok((vec![1, 2], vec![3])));
    let table = [(DATA, 1, 0, 9), (DATA, 2, 0, 9), (DATA, 3, WRITE, 9)];
    assert_eq!(outcome(Layout::Packed, 2, &head, &table), Ok((vec![1, 2], vec![3])));

    for len in [0, 1, 15, 17, 40] {
        for result in both(&[(TABLES, len, INDIRECT, 0)], &table) {
            assert_eq!(result, Err(RingError::IndirectLength { found: len }));
        }
    }
    for result in both(&[(TABLES, 48, INDIRECT | NEXT, 1), (DATA, 1, 0, 0)], &table) {
        assert_eq!(result, Err(RingError::IndirectInChain));
    }
    for result in both(&head, &[(TABLES, 16, INDIRECT, 0)]) {
        assert_eq!(result, Err(RingError::IndirectNested));
    }
    for addr in [u64::MAX, u64::MAX - 20, 1 << 50, TABLES + u64::from(rig::TABLES_LEN) - 32] {
        for result in both(&[(addr, 48, INDIRECT, 0)], &table) {
            assert_eq!(result, Err(RingError::IndirectAddress { addr, len: 48 }));
        }
    }
    // A split chain may end in an indirect descriptor (2.7.5.3.2), a packed list may not (2.8.19).
    let mixed = [(DATA, 9, NEXT, 1), (TABLES, 16, INDIRECT, 0)];
    let [split, packed] = both(&mixed, &[(DATA, 1, 0, 0)]);
    assert_eq!(split, Ok((vec![9, 1], vec![])));
    assert_eq!(packed, Err(RingError::IndirectInChain));
    // Split only: the table is a chain of its own.
    let outside = outcome(Layout::Split, 4, &[(TABLES, 32, INDIRECT, 0)], &[(DATA, 1, NEXT, 2)]);
    assert_eq!(outside, Err(RingError::Index { found: 2, allowed: 2 }));
    let looped = outcome(Layout::Split, 4, &[(TABLES, 32, INDIRECT, 0)], &[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)]);
    assert_eq!(looped, Err(RingError::ChainLength { allowed: 2 }));
}

#[test]
fn packed_tables_of_a_read_only_queue_are_readable() {
    // As DPDK's virtio driver writes them: the header's element is marked writable.
    let table = [(DATA, 12, WRITE), (DATA, 1, 0), (DATA, 2, 0)];
    for read_only in [false, true] {
        let (mut rig, config) = (rig(Layout::Packed, 4), config(Layout::Packed, 4));
        if read_only {
            rig.device.set_read_only();
        }
        for (i, (addr, len, flags)) in table.into_iter().enumerate() {
            rig.packed_descriptor(TABLES, i as u64, addr, len, 0, flags);
        }
        offer_packed(&rig, &config, &[(TABLES, 48, INDIRECT, 3)]);
        let mut batch = Batch::default();
        let found = rig.device.peek(&mut batch, 1);
        assert_eq!(found, if read_only { Ok(1) } else { Err(RingError::Order) });
        if read_only {
            assert_eq!((batch.chains[0].readable, batch.chains[0].writable), (3, 0));
        }
    }
}

#[test]
fn an_indirect_table_may_be_longer_than_a_small_queue() {
    for layout in [Layout::Split, Layout::Packed] {
        for (entries, allowed) in [(1024u16, true), (1025, false)] {
            let table: Vec<Raw> = (0..entries)
                .map(|i| (DATA, 1, if i + 1 < entries && layout == Layout::Split { NEXT } else { 0 }, i + 1))
                .collect();
            let result = outcome(layout, 2, &[(TABLES, u32::from(entries) * 16, INDIRECT, 0)], &table);
            let expected =
                if allowed { Ok((vec![1; 1024], vec![])) } else { Err(RingError::ChainLength { allowed: 1024 }) };
            assert_eq!(result, expected);
        }
    }
}

#[test]
fn an_indirect_table_need_not_be_aligned() {
    for layout in [Layout::Split, Layout::Packed] {
        for offset in [1, 4, 9, 15] {
            let (mut rig, config) = (rig(layout, 4), config(layout, 4));
            for i in 0..3u16 {
                let (table, at) = (TABLES + offset, u64::from(i));
                let (addr, len) = (DATA + at, u32::from(i) + 5);
                match layout {
                    Layout::Split => {
                        rig.split_descriptor(table, at, addr, len, if i < 2 { NEXT } else { WRITE }, i + 1)
                    }
                    Layout::Packed => rig.packed_descriptor(table, at, addr, len, 0, if i < 2 { 0 } else { WRITE }),
                }
            }
            let head = [(TABLES + offset, 48, INDIRECT, 3)];
            match layout {
                Layout::Split => offer_split(&rig, &config, &head),
                Layout::Packed => offer_packed(&rig, &config, &head),
            }
            let mut batch = Batch::default();
            assert_eq!(rig.device.peek(&mut batch, 1), Ok(1));
            let expected: Vec<_> = (0..3).map(|i| (rig.span(DATA + i, 1).as_ptr(), i as u32 + 5)).collect();
            assert_eq!(batch.spans.iter().map(|span| (span.as_ptr(), span.len())).collect::<Vec<_>>(), expected);
            assert_eq!((batch.chains[0].readable, batch.chains[0].writable), (2, 1));
        }
    }
}

#[test]
fn indirect_descriptors_have_to_be_negotiated() {
    for layout in [Layout::Split, Layout::Packed] {
        let config = config(layout, 4);
        let mut rig = Rig::new(&config);
        match layout {
            Layout::Split => offer_split(&rig, &config, &[(TABLES, 16, INDIRECT, 0)]),
            Layout::Packed => offer_packed(&rig, &config, &[(TABLES, 16, INDIRECT, 0)]),
        }
        assert_eq!(rig.device.peek(&mut Batch::default(), 1), Err(RingError::IndirectNotNegotiated));
    }
}

#[test]
fn a_chain_has_at_most_4_gib() {
    // 2.7.5.2. Four regions of 1 GiB, none of which is ever touched: a memfd is sparse.
    let gib = 1u64 << 30;
    let mut memory = rig::memory();
    for i in 2..6 {
        let spec = RegionSpec { guest_addr: i * gib, size: gib, user_addr: i * gib, mmap_offset: 0 };
        memory = memory.with_region(spec, memfd(gib).unwrap()).unwrap();
    }
    for layout in [Layout::Split, Layout::Packed] {
        let config = config(layout, 4);
        let whole = u32::MAX - 7;
        for (last, allowed) in [(7, true), (8, false)] {
            let mut rig = rig(layout, 4);
            rig.memory = memory.clone();
            rig.device = DeviceQueue::new(memory.clone(), &config).unwrap();
            let chain = [(2 * gib, whole, NEXT, 1), (DATA, last, 0, 0)];
            match layout {
                Layout::Split => offer_split(&rig, &config, &chain),
                Layout::Packed => offer_packed(&rig, &config, &chain),
            }
            let mut batch = Batch::default();
            if allowed {
                assert_eq!(rig.device.peek(&mut batch, 1), Ok(1));
                assert_eq!(batch.chains[0].readable_len, u32::MAX);
                assert_eq!(batch.spans.len(), 5, "four regions and the second element");
            } else {
                assert_eq!(rig.device.peek(&mut batch, 1), Err(RingError::TotalLength { found: 1 << 32 }));
            }
        }
    }
}

#[test]
fn a_buffer_may_cross_from_one_region_into_the_next() {
    let page = 4096;
    let mut memory = rig::memory();
    let base = 1 << 32;
    for i in 0..3 {
        let spec =
            RegionSpec { guest_addr: base + i * page, size: page, user_addr: base + i * 16 * page, mmap_offset: 0 };
        memory = memory.with_region(spec, memfd(page).unwrap()).unwrap();
    }
    for (layout, write) in [(Layout::Split, 0), (Layout::Split, WRITE), (Layout::Packed, 0), (Layout::Packed, WRITE)] {
        let config = config(layout, 4);
        let mut rig = rig(layout, 4);
        rig.memory = memory.clone();
        rig.device = DeviceQueue::new(memory.clone(), &config).unwrap();
        let element = [(base + page - 10, page as u32 + 20, write, 0)];
        match layout {
            Layout::Split => offer_split(&rig, &config, &element),
            Layout::Packed => offer_packed(&rig, &config, &element),
        }
        let mut batch = Batch::default();
        assert_eq!(rig.device.peek(&mut batch, 1), Ok(1));
        assert_eq!(batch.spans.iter().map(|span| span.len()).collect::<Vec<_>>(), [10, 4096, 10]);
        let expected = if write == 0 { (3, 0) } else { (0, 3) };
        assert_eq!((batch.chains[0].readable, batch.chains[0].writable), expected);
    }
}

#[test]
fn many_long_chains_come_in_several_batches() {
    // Every entry of the available ring names the same chain, as long as the queue.
    let config = config(Layout::Split, 4096);
    let mut rig = rig(Layout::Split, 4096);
    for i in 0..4096u16 {
        let flags = if i < 4095 { NEXT } else { 0 };
        rig.split_descriptor(config.descriptor_addr, i.into(), DATA, 1, flags, i + 1);
    }
    rig.put(config.driver_addr + 2, 4096u16.to_le_bytes());
    let mut batch = Batch::default();
    for _ in 0..3 {
        batch.clear();
        let found = rig.device.peek(&mut batch, 64).unwrap();
        assert_eq!((found, batch.spans.len()), (1, 4096));
        rig.device.consume(&batch.chains);
    }
}

#[test]
fn a_queue_is_checked_when_it_starts() {
    let memory = rig::memory();
    let start = |config: QueueConfig| DeviceQueue::new(memory.clone(), &config).map(|_| ());
    for size in [0, 3, 6, 65535, 65536, 1 << 31] {
        assert_eq!(start(QueueConfig { size, ..config(Layout::Split, 4) }), Err(RingError::Size(size)));
    }
    for size in [0, 32769, u32::MAX] {
        assert_eq!(start(QueueConfig { size, ..config(Layout::Packed, 4) }), Err(RingError::Size(size)));
    }
    for layout in [Layout::Split, Layout::Packed] {
        let good = config(layout, 8);
        for bad in [
            QueueConfig { descriptor_addr: good.descriptor_addr + 8, ..good },
            QueueConfig { driver_addr: good.driver_addr + 1, ..good },
            QueueConfig { device_addr: good.device_addr + 2, ..good },
        ] {
            assert!(matches!(start(bad), Err(RingError::Alignment { .. })));
        }
        let end = TABLES + u64::from(rig::TABLES_LEN);
        for bad in [
            QueueConfig { descriptor_addr: end - 64, ..good },
            QueueConfig { driver_addr: 1 << 40, ..good },
            QueueConfig { device_addr: u64::MAX - 3, ..good },
        ] {
            assert!(matches!(start(bad), Err(RingError::Unmapped { .. })));
        }
    }
    // Without EVENT_IDX nobody asks for the two bytes behind the rings (2.7.7, 2.7.10).
    let end = TABLES + u64::from(rig::TABLES_LEN);
    let tight = QueueConfig { driver_addr: end - (4 + 2 * 8), ..config(Layout::Split, 8) };
    assert_eq!(start(tight), Ok(()));
    assert!(matches!(start(QueueConfig { event_idx: true, ..tight }), Err(RingError::Unmapped { .. })));
    // A base has to be a place in the ring, and the used position may not be ahead of the available one.
    for base in [8, 8 << 16, 0x0008_0000 | 8, 0x8001_8000, 0x0001_0000, 0x0000_8001] {
        let found = start(QueueConfig { base, ..config(Layout::Packed, 8) });
        assert_eq!(found, Err(RingError::Base { found: base, size: 8 }), "{base:#x}");
    }
    for base in [PACKED_START, 0, 0x8000_0000, 0x8007_0007, 0x8003_8005, 0x0000_0007] {
        assert_eq!(start(QueueConfig { base, ..config(Layout::Packed, 8) }), Ok(()), "{base:#x}");
    }
}

#[test]
fn the_base_is_where_the_queue_goes_on() {
    let mut rig = Rig::new(&config(Layout::Packed, 5));
    for _ in 0..3 {
        assert_eq!(rig.driver.add(&[(DATA, 1), (DATA, 1)], &[], 7), Ok(true));
        rig.driver.publish();
        let mut batch = Batch::default();
        rig.device.peek(&mut batch, 1).unwrap();
        rig.device.consume(&batch.chains);
        rig.device.complete_all(&batch.chains);
        rig.device.publish();
        rig.driver.take().unwrap().unwrap();
    }
    // Six descriptors further in a ring of five: index 1, wrap counters turned to 0.
    assert_eq!(rig.device.base(), 0x0001_0001);
    assert_eq!(rig.driver.base(), 0x0001_0001);
    // One consumed and not completed: the positions differ.
    rig.driver.add(&[(DATA, 1)], &[], 7).unwrap();
    rig.driver.publish();
    let mut batch = Batch::default();
    rig.device.peek(&mut batch, 1).unwrap();
    rig.device.consume(&batch.chains);
    assert_eq!(rig.device.base(), 0x0001_0002);
}

#[test]
fn a_new_memory_table_is_used_at_once() {
    for layout in [Layout::Split, Layout::Packed] {
        let config = config(layout, 4);
        let mut rig = rig(layout, 4);
        rig.driver.add(&[(DATA, 100)], &[], 1).unwrap();
        rig.driver.publish();
        // The same ring with more memory.
        let spec = RegionSpec { guest_addr: 1 << 40, size: 4096, user_addr: 1 << 40, mmap_offset: 0 };
        let more = rig.memory.with_region(spec, memfd(4096).unwrap()).unwrap();
        rig.device.set_memory(more.clone()).unwrap();
        rig.driver.add(&[(1 << 40, 4096)], &[], 2).unwrap();
        rig.driver.publish();
        let mut batch = Batch::default();
        assert_eq!(rig.device.peek(&mut batch, 8), Ok(2));
        rig.device.consume(&batch.chains);
        rig.device.complete_all(&batch.chains);
        rig.device.publish();
        assert_eq!((rig.driver.take(), rig.driver.take()), (Ok(Some((1, 0))), Ok(Some((2, 0)))));
        // A table without the ring: the queue is broken but still harmless.
        let error = rig.device.set_memory(GuestMemory::new()).unwrap_err();
        assert!(matches!(error, RingError::Unmapped { addr, .. } if addr == config.descriptor_addr));
        assert_eq!(rig.device.peek(&mut batch, 8), Err(error));
        rig.device.disable_notifications();
        rig.device.publish();
    }
}

#[test]
fn errors_say_what_was_found_what_is_allowed_and_where_it_is_written() {
    let text = RingError::Index { found: 300, allowed: 256 }.to_string();
    assert!(text.contains("300") && text.contains("256") && text.contains("virtio 1.2, 2.7.5"), "{text}");
    let text = RingError::Unmapped { part: "used ring", addr: 0x1000, len: 2054 }.to_string();
    assert!(text.contains("used ring at 0x1000, 2054 bytes"), "{text}");
}

#[test]
fn chains_completed_before_they_are_consumed_leave_their_room() {
    // A receive queue's chains, as the switch handles them: peeked at, filled, then consumed and published together.
    let (mut rig, config) = (rig(Layout::Packed, 8), config(Layout::Packed, 8));
    let mut batch = Batch::default();
    for lap in 0..5u16 {
        let bits = if lap % 2 == 0 { AVAIL } else { 1 << 15 };
        for i in 0..8u64 {
            let next = if i % 4 == 3 { 0 } else { NEXT };
            rig.packed_descriptor(config.descriptor_addr, i, DATA, 10, 1, WRITE | next | bits);
        }
        batch.clear();
        assert_eq!(rig.device.peek(&mut batch, 8), Ok(2), "lap {lap}");
        for chain in &batch.chains {
            rig.device.complete(chain, 40);
        }
        rig.device.consume(&batch.chains);
        rig.device.publish();
        assert_eq!(rig.device.peek(&mut batch, 8), Ok(0));
    }
}

#[test]
fn a_split_queue_goes_by_its_used_ring_where_the_base_cannot_be_right() {
    for (base, used, offered, next) in [
        (0u16, 20_000u16, 20_100u16, 20_000u16), // a base that nobody kept up
        (20_050, 20_000, 20_100, 20_050),        // outstanding chains
        (20_101, 20_000, 20_100, 20_000),        // more than was offered
        (3, 65_530, 10, 3),
        (65_535, 3, 10, 3),
        (0, 0, 8, 0),
    ] {
        let config = QueueConfig { base: base.into(), ..config(Layout::Split, 256) };
        let rig = Rig::new(&config);
        rig.put(config.device_addr + 2, used.to_le_bytes());
        rig.put(config.driver_addr + 2, offered.to_le_bytes());
        let device = DeviceQueue::new(rig.memory.clone(), &config).unwrap();
        assert_eq!(device.base(), u32::from(next), "base {base}, used {used}, offered {offered}");
    }
}
