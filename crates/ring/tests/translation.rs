//! Queues behind an IOMMU: what waits, what is refused, and that everything else is as it was.

mod rig;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use proptest::prelude::*;
use rig::{DATA, TABLES, TABLES_LEN, config};
use viaduct_memory::iotlb::{Access, Iotlb, Miss, PAGE, Translation};
use viaduct_memory::{DirtyLog, GuestMemory, Mapping, memfd};
use viaduct_ring::{Batch, DeviceQueue, DriverQueue, Layout, QueueConfig, RingError, RingLayout};

/// I/O virtual addresses of rings and buffers are this much above the driver's own; those of indirect tables are the same.
const ABOVE: u64 = 1 << 40;
const LAYOUTS: [Layout; 2] = [Layout::Split, Layout::Packed];

struct Platform {
    memory: GuestMemory,
    iotlb: Arc<Iotlb>,
    driver: DriverQueue,
    config: QueueConfig,
    batch: Batch,
}

impl Platform {
    /// Nothing is mapped but the indirect tables.
    fn new(config: &QueueConfig) -> Platform {
        let memory = rig::memory();
        // Any file will do for what is only written to.
        let signal = std::fs::File::options().write(true).open("/dev/null").expect("it is there").into();
        let mut driver = DriverQueue::new(memory.clone(), config).expect("a legal queue");
        if config.indirect {
            driver.set_indirect_area(TABLES, TABLES_LEN).expect("a legal area");
        }
        let platform = Platform {
            memory,
            iotlb: Arc::new(Iotlb::new(signal)),
            driver,
            config: QueueConfig {
                descriptor_addr: ABOVE + config.descriptor_addr,
                driver_addr: ABOVE + config.driver_addr,
                device_addr: ABOVE + config.device_addr,
                ..*config
            },
            batch: Batch::default(),
        };
        platform.map(TABLES, TABLES, TABLES_LEN.into(), 1);
        platform
    }

    fn map(&self, iova: u64, user: u64, size: u64, permissions: u8) {
        self.iotlb.update(Translation::new(iova, size, user, permissions).expect("a legal translation"));
    }

    /// Maps the ring, whose pages lie where the driver sees them.
    fn map_ring(&self) {
        self.map(ABOVE, 0, DATA, 3);
    }

    fn device(&self) -> Result<DeviceQueue, RingError> {
        DeviceQueue::new(self.memory.behind(self.iotlb.clone()), &self.config)
    }

    fn started(&self) -> DeviceQueue {
        self.map_ring();
        self.device().expect("its ring is mapped")
    }

    /// The driver makes a buffer of these elements available.
    fn add(&mut self, out: &[(u64, u32)], input: &[(u64, u32)], token: u64) {
        assert!(self.driver.add(out, input, token).expect("a legal buffer"));
        self.driver.publish();
    }

    /// Identifiers of the chains that the device finds; none for those that are refused.
    fn peek(&mut self, device: &mut DeviceQueue) -> Vec<Option<u32>> {
        self.batch.clear();
        let found = device.peek(&mut self.batch, 64).expect("a legal ring");
        assert_eq!(found, self.batch.chains.len());
        let chains = self.batch.chains.iter();
        chains.map(|chain| (!chain.is_refused()).then_some(chain.readable_len + chain.writable_len)).collect()
    }

    /// Gives all of them back, and returns the driver's tokens.
    fn give_back(&mut self, device: &mut DeviceQueue) -> Vec<u64> {
        device.consume(&self.batch.chains);
        device.complete_all(&self.batch.chains);
        device.publish();
        std::iter::from_fn(|| self.driver.take().expect("a legal device").map(|(token, _)| token)).collect()
    }

    fn missed(&self) -> Vec<u64> {
        self.iotlb.take_misses().iter().map(|miss| miss.iova).collect()
    }
}

/// A queue of 16 descriptors.
fn queue(layout: Layout) -> QueueConfig {
    config(layout, 16)
}

#[test]
fn a_queue_starts_when_its_ring_is_translated() {
    for layout in LAYOUTS {
        let platform = Platform::new(&queue(layout));
        let addr = platform.config.descriptor_addr;
        assert_eq!(platform.device().err(), Some(RingError::Untranslated { addr }));
        assert!(platform.missed().contains(&ABOVE));
        platform.map(ABOVE, 0, DATA, if layout == Layout::Packed { 1 } else { 2 });
        let error = platform.device().expect_err("not what it needs");
        assert!(matches!(error, RingError::Forbidden { part, .. } if part.starts_with("descriptor")), "{error}");
        platform.map_ring();
        assert!(platform.device().is_ok());
    }
}

#[test]
fn a_chain_waits_for_all_it_needs_and_those_behind_it_wait_too() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        let page = |n: u64| ABOVE + DATA + n * PAGE;
        platform.map(page(0), DATA, PAGE, 1);
        platform.map(page(3), DATA, PAGE, 1);
        platform.add(&[(page(0), 10)], &[], 0);
        platform.add(&[(page(1), 20), (page(2) + 4000, 200)], &[], 1);
        platform.add(&[(page(3), 30)], &[], 2);
        platform.add(&[(page(9), 40)], &[], 3);
        assert_eq!(platform.peek(&mut device), [Some(10)]);
        // All that the chains need, also those behind the one that waits. Page 2 is crossed into page 3, which is known.
        assert_eq!(platform.missed(), [page(1), page(2), page(9)]);
        assert!(!device.is_waiting(), "there is one to be dealt with first");
        assert_eq!(platform.give_back(&mut device), [0]);
        assert_eq!(platform.peek(&mut device), []);
        assert!(device.is_waiting());
        assert!(device.broken().is_none(), "that is no fault");
        assert!(!device.translations_changed(), "nothing has");
        platform.map(page(1), DATA + PAGE, PAGE, 1);
        assert!(device.translations_changed());
        assert_eq!(platform.peek(&mut device), [], "its second half is missing");
        platform.map(page(2), DATA + 2 * PAGE, PAGE, 1);
        assert!(device.translations_changed());
        assert_eq!(platform.peek(&mut device), [Some(220), Some(30)]);
        assert_eq!(platform.give_back(&mut device), [1, 2]);
        platform.map(page(9), DATA, PAGE, 1);
        assert_eq!(platform.peek(&mut device), [Some(40)]);
        assert_eq!(platform.give_back(&mut device), [3]);
    }
}

#[test]
fn what_may_not_be_reached_is_refused_and_the_rest_goes_on() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        let page = |n: u64| ABOVE + DATA + n * PAGE;
        platform.map(page(0), DATA, 2 * PAGE, 1);
        platform.map(page(4), DATA, 2 * PAGE, 2);
        platform.add(&[(page(0), 10)], &[], 0);
        platform.add(&[(page(0), 20), (page(4), 20), (page(0), 20)], &[], 1);
        platform.add(&[], &[(page(0), 30)], 2);
        platform.add(&[], &[(page(4), 40)], 3);
        // One that misses something besides is refused at once, too.
        platform.add(&[(page(20), 50), (page(4), 50)], &[], 4);
        platform.add(&[(page(1), 60)], &[], 5);
        assert_eq!(platform.peek(&mut device), [Some(10), None, None, Some(40), None, Some(60)]);
        let refused = platform.batch.chains[1];
        assert_eq!(refused.slots, if layout == Layout::Packed { 3 } else { 1 });
        assert_eq!((refused.readable_len, refused.writable_len), (0, 0));
        assert!(platform.batch.readable(&refused).is_empty() && platform.batch.writable(&refused).is_empty());
        assert_eq!(platform.missed(), []);
        assert_eq!(platform.give_back(&mut device), [0, 1, 2, 3, 4, 5]);
        assert!(!device.is_waiting());
    }
}

#[test]
fn a_chain_is_refused_when_the_front_end_refuses_what_it_waits_for() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        platform.map(ABOVE + DATA, DATA, PAGE, 1);
        let unknown = ABOVE + DATA + 7 * PAGE;
        platform.add(&[(unknown + 1, 10)], &[], 0);
        platform.add(&[(ABOVE + DATA, 20)], &[], 1);
        platform.add(&[(unknown + 1, 30)], &[], 2);
        assert_eq!(platform.peek(&mut device), []);
        assert!(platform.iotlb.refuse(Miss { iova: unknown, access: Access::Read }));
        assert!(device.translations_changed());
        platform.iotlb.forget_refusals();
        assert_eq!(platform.peek(&mut device), [None, Some(20), None], "as long as one looks");
        assert_eq!(platform.missed(), [unknown], "once, and not again");
        platform.batch.chains.truncate(1);
        assert_eq!(platform.give_back(&mut device), [0]);
        // The next time it is asked for again: the driver may have mapped it.
        assert_eq!(platform.peek(&mut device), [Some(20)]);
        assert_eq!(platform.missed(), [unknown]);
    }
}

#[test]
fn a_chain_that_is_waited_for_can_be_given_up() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        platform.map(ABOVE + DATA, DATA, PAGE, 1);
        platform.add(&[(ABOVE + DATA + PAGE, 10), (ABOVE + DATA + 2 * PAGE, 10)], &[], 0);
        platform.add(&[(ABOVE + DATA, 20)], &[], 1);
        assert!(!device.give_up_chain(), "nothing is waited for");
        assert_eq!(platform.peek(&mut device), []);
        assert!(device.give_up_chain());
        assert!(!device.is_waiting());
        assert_eq!(platform.peek(&mut device), [None, Some(20)]);
        assert_eq!(platform.give_back(&mut device), [0, 1]);
        device.translations_removed(ABOVE, ABOVE);
        assert!(device.translations_changed() || !device.is_waiting(), "it is known again");
        platform.iotlb.invalidate(ABOVE, ABOVE + DATA - 1);
        device.translations_removed(ABOVE, ABOVE);
        assert!(device.is_waiting() && !device.give_up_chain(), "its ring must not be touched");
    }
}

#[test]
fn what_is_only_shown_is_neither_asked_nor_waited_for() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        platform.map(ABOVE + DATA, DATA, 3 * PAGE, 1);
        for page in 0..3 {
            platform.add(&[(ABOVE + DATA + page * PAGE, 10)], &[], page);
        }
        assert_eq!(platform.peek(&mut device), [Some(10), Some(10), Some(10)]);
        let mut shown = Batch::default();
        assert_eq!(device.look(&mut shown, 2), 2);
        // Between looking and showing the driver takes a page away.
        platform.iotlb.invalidate(ABOVE + DATA + PAGE, ABOVE + DATA + 2 * PAGE - 1);
        shown.clear();
        assert_eq!(device.look(&mut shown, 3), 1);
        assert_eq!((shown.chains.len(), shown.spans.len()), (1, 1));
        platform.iotlb.invalidate(ABOVE + DATA, ABOVE + DATA + PAGE - 1);
        shown.clear();
        assert_eq!(device.look(&mut shown, 3), 0);
        assert!(!device.is_waiting());
        assert_eq!(platform.missed(), []);
        assert_eq!(platform.give_back(&mut device), [0, 1, 2]);
        platform.add(&[(ABOVE + DATA + 2 * PAGE, 30)], &[], 3);
        assert_eq!(platform.peek(&mut device), [Some(30)]);
    }
}

#[test]
fn the_ring_of_a_broken_queue_is_not_touched_once_it_is_taken_away() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        platform.map(ABOVE + DATA, DATA, PAGE, 3);
        // A buffer of a transmit queue that a driver may not chain: an indirect descriptor, which was not negotiated.
        let word = if layout == Layout::Split { [8, 0, 0, 0, 4, 0, 0, 0] } else { [8, 0, 0, 0, 0, 0, 0x84, 0] };
        let span = platform.memory.translate_user(0, 16).expect("the first descriptor");
        // SAFETY: the memory is alive.
        unsafe { span.write(8, &word) };
        let available = platform.memory.translate_user(platform.config.driver_addr - ABOVE, 6).expect("the ring");
        if layout == Layout::Split {
            // SAFETY: as above.
            unsafe { available.write(0, &[0, 0, 1, 0, 0, 0]) };
        }
        let why = device.peek(&mut platform.batch, 8).expect_err("it breaks a rule");
        platform.iotlb.invalidate(ABOVE, ABOVE + DATA - 1);
        device.translations_removed(ABOVE, ABOVE + DATA - 1);
        let ring = || {
            let mut bytes = vec![0; DATA as usize];
            // SAFETY: as above.
            unsafe { platform.memory.translate_user(0, DATA as u32).expect("it").read(0, &mut bytes) };
            bytes
        };
        let before = ring();
        assert!(!device.enable_notifications() && !device.publish() && !device.is_waiting());
        device.disable_notifications();
        device.leave();
        assert_eq!(ring(), before);
        platform.map_ring();
        assert!(!device.translations_changed(), "it stays broken");
        assert_eq!(device.peek(&mut platform.batch, 8), Err(why));
    }
}

#[test]
fn an_indirect_table_is_translated_for_reading() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&QueueConfig { indirect: true, ..queue(layout) });
        let mut device = platform.started();
        platform.map(ABOVE + DATA, DATA, 2 * PAGE, 3);
        platform.iotlb.invalidate(TABLES, TABLES + u64::from(TABLES_LEN) - 1);
        let elements = [(ABOVE + DATA, 10), (ABOVE + DATA + 100, 20)];
        platform.add(&elements, &[], 0);
        platform.add(&elements, &elements, 1);
        assert_eq!(platform.peek(&mut device), []);
        assert!(!platform.missed().is_empty());
        platform.map(TABLES, TABLES, TABLES_LEN.into(), 2);
        assert!(device.translations_changed());
        assert_eq!(platform.peek(&mut device), [None, None], "it may only be written");
        platform.map(TABLES, TABLES, TABLES_LEN.into(), 1);
        assert_eq!(platform.peek(&mut device), [Some(30), Some(60)]);
        assert_eq!(platform.give_back(&mut device), [0, 1]);
    }
}

#[test]
fn an_element_outside_the_rules_still_breaks_the_queue() {
    let mut platform = Platform::new(&queue(Layout::Split));
    let mut device = platform.started();
    let rig_like = |index: u64, addr: u64, flags: u16, next: u16| {
        let bytes = [&addr.to_le_bytes()[..], &8u32.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        let span = platform.memory.translate_user(16 * index, 16).expect("the table");
        // SAFETY: the memory is alive.
        unsafe { span.write(0, &bytes) };
    };
    // A writable element whose translation is missing, and a readable one behind it.
    rig_like(0, ABOVE + DATA, 1 | 2, 1);
    rig_like(1, ABOVE + DATA, 0, 0);
    let available = platform.memory.translate_user(platform.config.driver_addr - ABOVE, 6).expect("the ring");
    // SAFETY: the memory is alive.
    unsafe { available.write(0, &[0, 0, 1, 0, 0, 0]) };
    assert_eq!(device.peek(&mut platform.batch, 8), Err(RingError::Order));
    assert_eq!(device.broken(), Some(&RingError::Order));
    assert!(!device.translations_changed());
    device.translations_removed(0, u64::MAX);
    assert_eq!(device.peek(&mut platform.batch, 8), Err(RingError::Order), "and stays so");
}

#[test]
fn a_ring_that_is_taken_away_is_not_touched_until_it_is_back() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        platform.map(ABOVE + DATA, DATA, PAGE, 3);
        for round in 0..40 {
            platform.add(&[(ABOVE + DATA, 10)], &[], round);
            // Only a part that is elsewhere goes: nothing happens.
            device.translations_removed(ABOVE + DATA, u64::MAX);
            assert!(!device.is_waiting());
            platform.iotlb.invalidate(ABOVE, ABOVE + DATA - 1);
            device.translations_removed(ABOVE, ABOVE + DATA - 1);
            assert!(device.is_waiting());
            assert_eq!(device.waiting(), 0, "nobody looks");
            assert!(!platform.missed().is_empty(), "it is asked for at once");
            let device_part = platform.memory.translate_user(platform.config.device_addr - ABOVE, 4).expect("there");
            let bytes = |span: viaduct_memory::Span| {
                let mut bytes = [0; 4];
                // SAFETY: the memory is alive.
                unsafe { span.read(0, &mut bytes) };
                bytes
            };
            let before = bytes(device_part);
            assert_eq!(platform.peek(&mut device), []);
            assert!(!device.enable_notifications());
            device.disable_notifications();
            assert!(!device.publish());
            assert_eq!(bytes(device_part), before);
            platform.map_ring();
            assert!(device.translations_changed());
            assert_eq!(platform.peek(&mut device), [Some(10)]);
            assert_eq!(platform.give_back(&mut device), [round]);
        }
    }
}

#[test]
fn what_is_staged_when_the_ring_is_taken_away_is_shown_when_it_is_back() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        platform.map(ABOVE + DATA, DATA, PAGE, 3);
        platform.add(&[(ABOVE + DATA, 10)], &[], 7);
        assert_eq!(platform.peek(&mut device), [Some(10)]);
        device.consume(&platform.batch.chains);
        device.complete_all(&platform.batch.chains);
        platform.iotlb.invalidate(ABOVE, ABOVE + DATA - 1);
        device.translations_removed(ABOVE, ABOVE + DATA - 1);
        assert!(!device.publish());
        assert!(platform.driver.take().expect("a legal device").is_none(), "the ring is not touched");
        platform.map_ring();
        assert!(device.translations_changed());
        device.publish();
        assert_eq!(platform.driver.take().expect("a legal device").map(|(token, _)| token), Some(7));
    }
}

#[test]
fn a_buffer_of_many_pages_is_not_looked_up_to_its_end() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        // Whoever looked at all 400 pages would find that this one may not be read.
        platform.map(ABOVE + DATA + 300 * PAGE, DATA, PAGE, 2);
        platform.add(&[(ABOVE + DATA, 400 * PAGE as u32)], &[], 0);
        assert_eq!(platform.peek(&mut device), []);
        assert!(device.is_waiting());
        assert_eq!(platform.missed().len(), 256);
    }
}

#[test]
fn a_ring_that_moves_is_followed() {
    let mut platform = Platform::new(&queue(Layout::Split));
    let mut device = platform.started();
    platform.map(ABOVE + DATA, DATA, PAGE, 3);
    platform.add(&[(ABOVE + DATA, 10)], &[], 0);
    // The front-end says that the ring's first page is elsewhere: there it is empty.
    let elsewhere = DATA + 100 * PAGE;
    let stale = platform.iotlb.update(Translation::new(ABOVE, PAGE, elsewhere, 3).expect("legal"));
    assert_eq!(stale, Some((ABOVE, ABOVE + PAGE - 1)));
    device.translations_removed(ABOVE, ABOVE + PAGE - 1);
    assert!(!device.is_waiting(), "it is known where");
    assert_eq!(platform.peek(&mut device), []);
    platform.map_ring();
    device.translations_removed(ABOVE, ABOVE + PAGE - 1);
    assert_eq!(platform.peek(&mut device), [Some(10)]);
}

#[test]
fn a_new_memory_table_is_reached_through_the_same_translations() {
    for layout in LAYOUTS {
        let mut platform = Platform::new(&queue(layout));
        let mut device = platform.started();
        platform.map(ABOVE + DATA, DATA, PAGE, 3);
        platform.add(&[(ABOVE + DATA, 10)], &[], 0);
        device.set_memory(platform.memory.behind(platform.iotlb.clone())).expect("the ring is in it");
        assert_eq!(platform.peek(&mut device), [Some(10)]);
        platform.iotlb.invalidate(0, u64::MAX);
        device.translations_removed(0, u64::MAX);
        device.set_memory(platform.memory.behind(platform.iotlb.clone())).expect("it waits anyway");
        assert!(device.is_waiting());
        platform.map_ring();
        device.set_memory(platform.memory.behind(platform.iotlb.clone())).expect("it is there again");
        assert!(!device.is_waiting());
        device.translations_removed(0, u64::MAX);
        assert!(!device.is_waiting(), "it is known still, and found at once");
        platform.iotlb.invalidate(0, u64::MAX);
        device.translations_removed(0, u64::MAX);
        // A table without the ring, while the ring is waited for: that is an error after all.
        let error = device.set_memory(GuestMemory::new()).expect_err("no IOMMU, and no memory");
        assert_eq!(device.broken(), Some(&error));
        assert_eq!(device.peek(&mut platform.batch, 8), Err(error));
    }
}

#[test]
fn what_is_written_into_a_ring_in_pieces_is_logged_where_it_lies() {
    for layout in LAYOUTS {
        let platform = Platform::new(&config(layout, 1024));
        let pages: Vec<u64> = (0..16).rev().map(|page| 2 * page).collect();
        scatter(&platform, ABOVE, &pages, 3);
        let file = memfd(PAGE).expect("memory");
        let log = DirtyLog::new(file.as_fd(), 0, PAGE).expect("a log");
        let bits = Mapping::new(file.as_fd(), 0, PAGE).expect("the same log");
        let memory = platform.memory.behind(platform.iotlb.clone()).with_log(Some(log)).expect("it covers the memory");
        let mut device = DeviceQueue::new(memory, &platform.config).expect("mapped");
        // I/O virtual, as QEMU says it.
        device.set_log_addr(Some(platform.config.device_addr));
        let marked: Vec<u64> = (0..8 * PAGE)
            .filter(|page| {
                // SAFETY: inside the mapping.
                let byte = unsafe { bits.as_ptr().add((page / 8) as usize).read_volatile() };
                byte >> (page % 8) & 1 == 1
            })
            .collect();
        let parts = RingLayout::new(layout, 1024, false).expect("a legal size");
        let mut written = vec![(platform.config.device_addr, parts.device.size)];
        if layout == Layout::Packed {
            written.push((platform.config.descriptor_addr, parts.descriptor.size));
        }
        let touched = |(addr, size): (u64, u64)| (addr - ABOVE) / PAGE..=(addr - ABOVE + size - 1) / PAGE;
        let expected: BTreeSet<u64> =
            written.into_iter().flat_map(touched).map(|page| DATA / PAGE + pages[page as usize]).collect();
        assert!(expected.len() >= 3);
        assert_eq!(marked, expected.into_iter().collect::<Vec<_>>());
    }
}

/// Where the pages of a range lie: a permutation, so that neighbours seldom are.
fn scatter(platform: &Platform, iova: u64, pages: &[u64], permissions: u8) {
    for (index, page) in (0..).zip(pages) {
        platform.map(iova + index * PAGE, DATA + page * PAGE, PAGE, permissions);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// A buffer over pages in any order is read byte for byte.
    #[test]
    fn buffers_over_scattered_pages_are_read_in_order(
        packed in any::<bool>(),
        indirect in any::<bool>(),
        pages in Just((0..16u64).collect::<Vec<_>>()).prop_shuffle(),
        elements in prop::collection::vec((0..15 * PAGE, 1..3 * PAGE as u32), 1..6),
    ) {
        let layout = if packed { Layout::Packed } else { Layout::Split };
        let mut platform = Platform::new(&QueueConfig { indirect, ..queue(layout) });
        let mut device = platform.started();
        // What lies at offset n from the first I/O virtual address is byte n of this.
        let byte = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        for (index, page) in (0..).zip(&pages) {
            let span = platform.memory.translate_user(DATA + page * PAGE, PAGE as u32).expect("there");
            let content: Vec<u8> = (index * PAGE..(index + 1) * PAGE).map(byte).collect();
            // SAFETY: the memory is alive.
            unsafe { span.write(0, &content) };
        }
        scatter(&platform, ABOVE + DATA, &pages, 1);
        let inside = |offset: u64, len: u32| u64::from(len).min(16 * PAGE - offset) as u32;
        let out: Vec<_> = elements.iter().map(|&(at, len)| (ABOVE + DATA + at, inside(at, len))).collect();
        platform.add(&out, &[], 7);
        let expected: Vec<u8> =
            elements.iter().flat_map(|&(at, len)| (at..at + u64::from(inside(at, len))).map(byte)).collect();
        prop_assert_eq!(platform.peek(&mut device), [Some(expected.len() as u32)]);
        let mut found = Vec::new();
        for span in platform.batch.readable(&platform.batch.chains[0]) {
            let at = found.len();
            found.resize(at + span.len() as usize, 0);
            // SAFETY: the memory is alive.
            unsafe { span.read(0, &mut found[at..]) };
        }
        prop_assert_eq!(found, expected);
        prop_assert_eq!(platform.give_back(&mut device), [7]);
    }

    /// A ring of many pages that do not lie together works like any other: both sides see it in one piece.
    #[test]
    fn rings_over_scattered_pages_work(
        packed in any::<bool>(),
        pages in Just((0..16u64).collect::<Vec<_>>()).prop_shuffle(),
        rounds in 1..40u64,
    ) {
        let layout = if packed { Layout::Packed } else { Layout::Split };
        let mut platform = Platform::new(&config(layout, 1024));
        scatter(&platform, ABOVE, &pages, 3);
        let translated = platform.memory.behind(platform.iotlb.clone());
        platform.driver = DriverQueue::new(translated, &platform.config).expect("mapped");
        let mut device = platform.device().expect("mapped");
        platform.map(ABOVE + DATA, DATA + 100 * PAGE, PAGE, 3);
        for round in 0..rounds {
            for token in 0..100 {
                platform.add(&[(ABOVE + DATA, 1 + token as u32)], &[], 100 * round + token);
            }
            let mut tokens = Vec::new();
            while tokens.len() < 100 {
                prop_assert!(!platform.peek(&mut device).is_empty());
                tokens.extend(platform.give_back(&mut device));
            }
            prop_assert_eq!(tokens, (100 * round..100 * round + 100).collect::<Vec<_>>());
        }
    }
}
