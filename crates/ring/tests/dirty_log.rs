//! What a device writes into its ring is logged, and nothing else: page by page, in both layouts, at any place of the ring.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use proptest::prelude::*;
use viaduct_memory::{DirtyLog, GuestMemory, Mapping, RegionCache, memfd};
use viaduct_ring::{Batch, DeviceQueue, DriverQueue, Layout, PACKED_START, QueueConfig, RingLayout};

const PAGE: u64 = DirtyLog::PAGE;
const MEMORY: u64 = 4 << 20;
const BUFFERS: u64 = 2 << 20;
/// The device part is logged as if it lay this much higher, beyond the guest's memory.
const ELSEWHERE: u64 = 16 << 20;
const LOG: u64 = 1024;

struct Rig {
    memory: GuestMemory,
    driver: DriverQueue,
    device: DeviceQueue,
    config: QueueConfig,
    bits: Mapping,
    log: DirtyLog,
    batch: Batch,
}

/// Each part on pages of its own.
fn config(layout: Layout, size: u32, event_idx: bool) -> QueueConfig {
    let parts = RingLayout::new(layout, size, true).unwrap();
    let driver_addr = parts.descriptor.size.next_multiple_of(PAGE);
    let device_addr = (driver_addr + parts.driver.size).next_multiple_of(PAGE);
    let base = if layout == Layout::Packed { PACKED_START } else { 0 };
    let (indirect, in_order, descriptor_addr) = (false, false, 0);
    QueueConfig { layout, size, descriptor_addr, driver_addr, device_addr, base, event_idx, indirect, in_order }
}

impl Rig {
    fn new(config: QueueConfig) -> Rig {
        let memory = GuestMemory::allocate(MEMORY).unwrap();
        let driver = DriverQueue::new(memory.clone(), &config).unwrap();
        let file = memfd(LOG).unwrap();
        let log = DirtyLog::new(file.as_fd(), 0, LOG).unwrap();
        let bits = Mapping::new(file.as_fd(), 0, LOG).unwrap();
        let device = DeviceQueue::new(memory.clone(), &config).unwrap();
        Rig { memory, driver, device, config, bits, log, batch: Batch::default() }
    }

    /// Begins to log, and forgets what that alone marks.
    fn attach(&mut self) {
        self.device.set_log_addr(Some(self.config.device_addr + ELSEWHERE));
        self.device.set_memory(self.memory.with_log(Some(self.log.clone())).unwrap()).unwrap();
        self.take();
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        let span = self.memory.translate(&mut RegionCache::default(), 0, MEMORY as u32).unwrap();
        // SAFETY: `self` keeps the memory alive.
        unsafe { span.read(0, &mut bytes) };
        bytes
    }

    /// The pages marked since the last time.
    fn take(&self) -> BTreeSet<u64> {
        let byte = |at: u64| {
            // SAFETY: within the mapping; nobody else is at it.
            unsafe { std::mem::take(&mut *self.bits.as_ptr().add(at as usize)) }
        };
        (0..LOG)
            .flat_map(|at| {
                let byte = byte(at);
                (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| 8 * at + bit)
            })
            .collect()
    }

    /// Where a page of memory is logged.
    fn logged_at(&self, page: u64) -> u64 {
        let device = self.config.device_addr / PAGE;
        if page >= device && page < BUFFERS / PAGE { page + ELSEWHERE / PAGE } else { page }
    }

    /// Lets the device do something: what changes is what is logged, but for `also`, where it may write what was there.
    fn check(&mut self, also: &[u64], act: impl FnOnce(&mut DeviceQueue, &mut Batch)) {
        let before = self.bytes();
        act(&mut self.device, &mut self.batch);
        let after = self.bytes();
        let pages = |bytes: &[u8]| bytes.chunks(PAGE as usize).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let changed = pages(&before).into_iter().zip(pages(&after)).zip(0..).filter(|((old, new), _)| old != new);
        let changed: BTreeSet<u64> = changed.map(|(_, page)| self.logged_at(page)).collect();
        let mut logged = self.take();
        assert!(logged.is_superset(&changed), "written {changed:x?}, logged {logged:x?}");
        for page in also {
            logged.remove(&self.logged_at(*page));
        }
        assert!(logged.is_subset(&changed), "written {changed:x?}, logged {logged:x?}");
    }

    /// Overwrites the used elements, all of which the driver has taken, so that each write shows.
    fn spoil(&self) {
        if self.config.layout == Layout::Split {
            let addr = self.config.device_addr + 4;
            let span = self.memory.translate(&mut RegionCache::default(), addr, 8 * self.config.size).unwrap();
            // SAFETY: `self` keeps the memory alive.
            unsafe { span.write(0, &vec![0xee; 8 * self.config.size as usize]) };
        }
    }

    /// So many buffers of so many elements go round.
    fn round(&mut self, buffers: u32, elements: usize) {
        self.spoil();
        for _ in 0..buffers {
            self.driver.add(&[], &vec![(BUFFERS, 64); elements], 0).unwrap();
        }
        self.driver.publish();
        self.check(&[], |device, batch| {
            batch.clear();
            device.peek(batch, usize::MAX >> 1).unwrap();
            device.consume(&batch.chains);
        });
        self.check(&[], |device, batch| {
            for chain in &batch.chains {
                device.complete(chain, 7);
            }
            device.publish();
        });
        while self.driver.take().unwrap().is_some() {}
    }

    fn notifications(&mut self, wanted: bool) {
        let end = self.config.device_addr + 4 + 8 * u64::from(self.config.size);
        let also = [self.config.device_addr / PAGE, end / PAGE];
        // It may write what was there, but only into a page that is logged.
        let also = if self.config.layout == Layout::Packed { &also[..1] } else { &also };
        self.check(also, |device, _| {
            if wanted {
                device.enable_notifications();
            } else {
                device.disable_notifications();
            }
        });
    }
}

fn layout() -> impl Strategy<Value = (Layout, u32)> {
    prop_oneof![
        prop_oneof![Just(4u32), Just(256), Just(1024), Just(32768)].prop_map(|size| (Layout::Split, size)),
        prop_oneof![Just(5u32), Just(256), Just(1000), Just(32768)].prop_map(|size| (Layout::Packed, size)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_page_is_logged_if_and_only_if_it_is_written(
        (layout, size) in layout(),
        event_idx: bool,
        rounds in prop::collection::vec((1..2000u32, 1..4usize, any::<bool>()), 1..12),
    ) {
        let mut rig = Rig::new(config(layout, size, event_idx));
        // Some way into the ring.
        for (buffers, elements, _) in &rounds {
            rig.driver.add(&[], &vec![(BUFFERS, 64); *elements], 0).unwrap();
            rig.driver.publish();
            rig.batch.clear();
            rig.device.peek(&mut rig.batch, *buffers as usize).unwrap();
            rig.device.consume(&rig.batch.chains);
            rig.device.complete_all(&rig.batch.chains);
            rig.device.publish();
            while rig.driver.take().unwrap().is_some() {}
        }
        prop_assert_eq!(rig.take(), BTreeSet::new(), "nobody logs yet");
        rig.attach();
        for (buffers, elements, wanted) in rounds {
            rig.round(buffers.min(size / elements as u32), elements);
            rig.notifications(wanted);
        }
        rig.device.set_memory(rig.memory.clone()).unwrap();
        rig.driver.add(&[], &[(BUFFERS, 64)], 0).unwrap();
        rig.driver.publish();
        rig.batch.clear();
        rig.device.peek(&mut rig.batch, 1).unwrap();
        rig.device.consume(&rig.batch.chains);
        rig.device.complete_all(&rig.batch.chains);
        rig.device.publish();
        prop_assert_eq!(rig.take(), BTreeSet::new(), "the log has ended");
    }
}

fn pages(addr: u64, len: u64) -> BTreeSet<u64> {
    (addr / PAGE..=(addr + len - 1) / PAGE).collect()
}

#[test]
fn a_queue_that_gets_a_log_marks_all_that_it_ever_writes() {
    for (layout, size) in [(Layout::Split, 1024), (Layout::Packed, 1000)] {
        let mut rig = Rig::new(config(layout, size, true));
        let parts = RingLayout::new(layout, size, true).unwrap();
        let descriptors = if layout == Layout::Packed { pages(0, parts.descriptor.size) } else { BTreeSet::new() };
        let device = pages(rig.config.device_addr + ELSEWHERE, parts.device.size);
        // The used part counts only if its log is asked for (VHOST_VRING_F_LOG).
        rig.device.set_memory(rig.memory.with_log(Some(rig.log.clone())).unwrap()).unwrap();
        assert_eq!(rig.take(), descriptors);
        rig.device.disable_notifications();
        assert_eq!(rig.take(), BTreeSet::new());
        rig.device.set_log_addr(Some(rig.config.device_addr + ELSEWHERE));
        assert_eq!(rig.take(), &device | &descriptors);
        rig.device.disable_notifications();
        rig.device.set_log_addr(None);
        rig.take();
        rig.device.enable_notifications();
        assert_eq!(rig.take(), BTreeSet::new());
    }
}

#[test]
fn an_address_near_the_end_of_all_addresses_marks_nothing_else() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut rig = Rig::new(config(layout, 256, false));
        rig.attach();
        rig.device.set_log_addr(Some(u64::MAX - 3));
        rig.take();
        rig.driver.add(&[], &[(BUFFERS, 64)], 0).unwrap();
        rig.driver.publish();
        rig.device.peek(&mut rig.batch, 1).unwrap();
        rig.device.consume(&rig.batch.chains);
        rig.device.complete_all(&rig.batch.chains);
        rig.device.publish();
        rig.device.enable_notifications();
        let descriptors = if layout == Layout::Packed { BTreeSet::from([0]) } else { BTreeSet::new() };
        assert_eq!(rig.take(), descriptors);
    }
}

#[test]
fn buffers_that_a_killed_device_did_not_show_are_logged_as_they_go_back() {
    // 256 descriptors are a page: the gap lies on one, on two, and on both sides of the ring's end.
    for (start, pages) in [(0, vec![0]), (250, vec![0, 1]), (300, vec![1]), (390, vec![0, 1])] {
        let mut rig = Rig::new(config(Layout::Packed, 400, false));
        let serve = |rig: &mut Rig, publish: bool| {
            rig.batch.clear();
            rig.device.peek(&mut rig.batch, 64).unwrap();
            rig.device.consume(&rig.batch.chains);
            for chain in &rig.batch.chains {
                rig.device.complete(chain, 60);
            }
            publish && rig.device.publish()
        };
        for _ in 0..start {
            rig.driver.add(&[], &[(BUFFERS, 64)], 0).unwrap();
            rig.driver.publish();
            serve(&mut rig, true);
            rig.driver.take().unwrap().unwrap();
        }
        for token in 0..20 {
            rig.driver.add(&[], &[(BUFFERS, 64)], token).unwrap();
        }
        rig.driver.publish();
        serve(&mut rig, false);
        rig.device = DeviceQueue::new(rig.memory.clone(), &rig.config).unwrap();
        rig.attach();
        rig.device.leave();
        assert_eq!(rig.take(), BTreeSet::from_iter(pages), "from {start} on");
        let given_back: Vec<_> = std::iter::from_fn(|| rig.driver.take().unwrap()).collect();
        assert_eq!(given_back, (0..20).map(|token| (token, 0)).collect::<Vec<_>>());
    }
}
