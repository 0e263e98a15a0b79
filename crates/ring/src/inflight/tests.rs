//! A device is killed before each store in turn, and another one goes on: no buffer is lost and none comes back twice.

use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use viaduct_memory::{GuestMemory, Mapping, memfd};

use super::inflight_bytes;
use crate::{Batch, DeviceQueue, DriverQueue, Layout, PACKED_START, QueueConfig, RingError, RingLayout};

thread_local! {
    /// Stores until the device dies; `None`: it lives.
    static LIFE: Cell<Option<u32>> = const { Cell::new(None) };
}

/// What a killed device leaves behind in this process.
struct Killed;

pub(crate) fn may_die() {
    match LIFE.get() {
        Some(0) => {
            LIFE.set(None);
            resume_unwind(Box::new(Killed));
        }
        Some(left) => LIFE.set(Some(left - 1)),
        None => {}
    }
}

/// Does a device's work until it is killed before its store number `life`; whether it was.
pub(crate) fn is_killed(life: u32, work: impl FnOnce()) -> bool {
    LIFE.set(Some(life));
    let killed = catch_unwind(AssertUnwindSafe(work));
    LIFE.set(None);
    match killed {
        Ok(()) => false,
        Err(cause) if cause.is::<Killed>() => true,
        Err(cause) => resume_unwind(cause),
    }
}

const DATA: u64 = 1 << 16;

struct Scene {
    memory: GuestMemory,
    config: QueueConfig,
    record: Arc<Mapping>,
    driver: DriverQueue,
    next: u64,
    outstanding: BTreeSet<u64>,
    /// How often the device saw each buffer.
    seen: Vec<u32>,
}

impl Scene {
    fn new(layout: Layout, size: u32) -> Scene {
        let memory = GuestMemory::allocate(1 << 20).unwrap();
        let (descriptor_addr, driver_addr, device_addr, _) = RingLayout::new(layout, size, true).unwrap().place(0);
        let config = QueueConfig {
            layout,
            size,
            descriptor_addr,
            driver_addr,
            device_addr,
            base: if layout == Layout::Packed { PACKED_START } else { 65530 },
            event_idx: false,
            indirect: true,
            in_order: false,
        };
        let driver = DriverQueue::new(memory.clone(), &config).unwrap();
        let bytes = inflight_bytes(layout, size);
        let record = Arc::new(Mapping::new(memfd(2 * bytes).unwrap().as_fd(), 0, 2 * bytes).unwrap());
        Scene { memory, config, record, driver, next: 0, outstanding: BTreeSet::new(), seen: Vec::new() }
    }

    /// A new process: all it knows is what the front-end gives it, and that base is long out of date.
    fn device(&self) -> (DeviceQueue, usize) {
        let mut device = DeviceQueue::new(self.memory.clone(), &self.config).unwrap();
        let again = device.attach_inflight(self.record.clone(), inflight_bytes(self.config.layout, self.config.size));
        (device, again.unwrap())
    }

    /// The driver fills the ring with buffers of one to three elements, whose number is their place.
    fn send(&mut self) {
        loop {
            let place = |i: u64| (DATA + 8 * self.next + i, 1);
            let elements = [place(0), place(1), place(2)];
            let count = 1 + (self.next % 3) as usize;
            if count > self.config.size as usize || !self.driver.add(&elements[..count], &[], self.next).unwrap() {
                break;
            }
            self.outstanding.insert(self.next);
            self.seen.push(0);
            self.next += 1;
        }
        self.driver.publish();
    }

    fn receive(&mut self) {
        while let Some((token, _)) = self.driver.take().expect("the rules are kept") {
            assert!(self.outstanding.remove(&token), "buffer {token} came back twice");
            assert!(self.seen[token as usize] > 0, "buffer {token} came back unseen");
        }
    }

    /// One device's work: takes in batches, gives back out of order and in parts.
    fn serve(&mut self, device: &mut DeviceQueue, rounds: u32) {
        let mut held = VecDeque::new();
        for round in 0..rounds {
            let mut batch = Batch::default();
            device.peek(&mut batch, 1 + round as usize % 4).unwrap();
            device.consume(&batch.chains);
            assert_eq!(device.broken(), None);
            for chain in &batch.chains {
                let place = batch.readable(chain)[0].as_ptr() as usize - self.data() as usize;
                assert_eq!(batch.readable(chain).len(), 1 + (place / 8) % 3);
                self.seen[place / 8] += 1;
                held.push_back(*chain);
            }
            for _ in 0..round % 5 {
                if let Some(chain) = if round % 2 == 0 { held.pop_front() } else { held.pop_back() } {
                    device.complete(&chain, 0);
                }
            }
            if round % 3 == 0 {
                device.publish();
                self.receive();
                self.send();
            }
        }
        for chain in held {
            device.complete(&chain, 0);
        }
        device.publish();
    }

    fn data(&self) -> *mut u8 {
        self.memory.translate(&mut Default::default(), DATA, 1).unwrap().as_ptr()
    }

    /// A device that is killed after `life` stores; whether it was.
    fn live_and_die(&mut self, life: u32) -> bool {
        is_killed(life, || {
            let (mut device, _) = self.device();
            self.serve(&mut device, 20);
        })
    }

    /// A last device gives everything back.
    fn finish(&mut self) {
        let (mut device, again) = self.device();
        let mut batch = Batch::default();
        if again > 0 {
            assert_eq!(device.peek(&mut batch, usize::MAX), Ok(again), "first of all what was taken before");
            let starts: Vec<_> = batch.chains.iter().map(|chain| batch.readable(chain)[0].as_ptr()).collect();
            assert!(starts.is_sorted(), "in the order in which it was taken");
        }
        for _ in 0..20 {
            batch.clear();
            device.peek(&mut batch, 100).unwrap();
            device.consume(&batch.chains);
            for chain in &batch.chains {
                let place = batch.readable(chain)[0].as_ptr() as usize - self.data() as usize;
                self.seen[place / 8] += 1;
                // One by one: nothing that the killed device prepared may be taken for used.
                device.complete(chain, 0);
                device.publish();
                self.receive();
            }
        }
        assert!(self.outstanding.is_empty(), "lost: {:?}", self.outstanding);
        assert_eq!(self.driver.free(), self.config.size as usize);
    }
}

fn every_death(layout: Layout, size: u32) {
    let mut life = 0;
    loop {
        let mut scene = Scene::new(layout, size);
        scene.send();
        let killed = scene.live_and_die(life);
        scene.receive();
        // And the next one too, somewhere else, perhaps while it takes up the work of the first.
        scene.live_and_die(life * 7 % 61);
        scene.receive();
        scene.finish();
        if !killed {
            break;
        }
        life += 1;
    }
    assert!(life > 100, "the device made only {life} stores");
}

#[test]
fn a_split_device_may_die_anywhere() {
    every_death(Layout::Split, 8);
}

#[test]
fn a_packed_device_may_die_anywhere() {
    every_death(Layout::Packed, 7);
}

#[test]
fn a_packed_device_with_a_ring_of_one_may_die_anywhere() {
    let mut life = 0;
    loop {
        let mut scene = Scene::new(Layout::Packed, 1);
        scene.send();
        let killed = scene.live_and_die(life);
        scene.receive();
        scene.finish();
        if !killed {
            break;
        }
        life += 1;
    }
}

#[test]
fn an_orderly_end_leaves_nothing_in_flight() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut scene = Scene::new(layout, 8);
        scene.send();
        assert!(!scene.live_and_die(u32::MAX));
        scene.receive();
        let (device, again) = scene.device();
        assert_eq!(again, 0);
        assert_ne!(device.base(), scene.config.base, "the record knows better");
    }
}

#[test]
fn a_record_is_checked_before_it_is_believed() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut scene = Scene::new(layout, 8);
        scene.send();
        let bytes = inflight_bytes(layout, 8);
        let fresh = || DeviceQueue::new(scene.memory.clone(), &scene.config).unwrap();
        let range = |offset| RingError::InflightRange { offset, len: bytes, found: 2 * bytes };
        for offset in [bytes + 8, 4, 2 * bytes, u64::MAX - 7] {
            assert_eq!(fresh().attach_inflight(scene.record.clone(), offset), Err(range(offset)));
        }
        // Any bytes: an error or a queue that delivers only what lies in memory.
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut errors = 0;
        for _ in 0..3_000 {
            for at in (0..bytes).step_by(2) {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let value = if seed.is_multiple_of(5) { (seed >> 32) as u16 } else { (seed >> 32) as u16 % 9 };
                let value = match at {
                    8 => 1,
                    10 => 8,
                    // The used index of a split ring that has just been started.
                    14 if layout == Layout::Split && value < 9 => 65530 - value,
                    _ => value,
                };
                // SAFETY: inside the mapping, whose pages begin on a multiple of 2.
                unsafe { scene.record.as_ptr().wrapping_add(at as usize).cast::<u16>().write_volatile(value) };
            }
            let mut device = fresh();
            match device.attach_inflight(scene.record.clone(), 0) {
                Err(_) => errors += 1,
                Ok(again) => {
                    let mut batch = Batch::default();
                    let found = device.peek(&mut batch, 100).unwrap_or(0);
                    assert!(found <= again.max(8));
                    device.consume(&batch.chains);
                    device.complete_all(&batch.chains);
                    device.publish();
                }
            }
        }
        assert!(errors > 100 && errors < 3_000, "{errors}");
    }
}
