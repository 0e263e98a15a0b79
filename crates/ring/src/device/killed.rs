//! A device without a record is killed before each store in turn, while the driver has published all it wrote or is in the
//! middle of it. The next device has only the ring: every buffer comes back, once and in order.

use viaduct_memory::GuestMemory;

use crate::inflight::tests::is_killed;
use crate::{Batch, DeviceQueue, DriverQueue, Layout, PACKED_START, QueueConfig, RingLayout};

const DATA: u64 = 1 << 16;
const WRITTEN: u32 = 60;

struct Scene {
    memory: GuestMemory,
    config: QueueConfig,
    driver: DriverQueue,
    /// Elements of the longest list.
    longest: u64,
    added: u64,
    returned: u64,
    /// Of those returned, how many are empty.
    empty: u64,
    /// Descriptors that the driver has written and not published.
    staged: u32,
}

impl Scene {
    fn new(memory: &GuestMemory, size: u32) -> Scene {
        let (descriptor_addr, driver_addr, device_addr, _) =
            RingLayout::new(Layout::Packed, size, false).unwrap().place(0);
        let config = QueueConfig {
            layout: Layout::Packed,
            size,
            descriptor_addr,
            driver_addr,
            device_addr,
            base: PACKED_START,
            event_idx: false,
            indirect: false,
            in_order: false,
        };
        let driver = DriverQueue::new(memory.clone(), &config).unwrap();
        // A list of all descriptors but one can look like what a driver writes all at once.
        let longest = u64::from(size.saturating_sub(2).clamp(1, 3));
        Scene { memory: memory.clone(), config, driver, longest, added: 0, returned: 0, empty: 0, staged: 0 }
    }

    /// What the front-end gives to a new process; it has not been told the position since the ring was new.
    fn device(&self) -> DeviceQueue {
        DeviceQueue::new(self.memory.clone(), &self.config).unwrap()
    }

    /// The driver writes lists of different lengths, into at most `most` descriptors.
    fn add(&mut self, most: u32) {
        loop {
            let count = 1 + self.added % self.longest;
            let elements: Vec<_> = (0..count).map(|i| (DATA + 64 * (4 * (self.added % 1000) + i), 64)).collect();
            if self.staged + count as u32 > most || !self.driver.add(&[], &elements, self.added).unwrap() {
                break;
            }
            self.added += 1;
            self.staged += count as u32;
        }
    }

    fn publish(&mut self) {
        self.driver.publish();
        self.staged = 0;
    }

    fn take(&mut self) {
        while let Some((token, written)) = self.driver.take().expect("the rules are kept") {
            assert_eq!(token, self.returned, "each once, in order");
            assert!(written == WRITTEN || written == 0, "{written}");
            self.returned += 1;
            self.empty += u64::from(written == 0);
        }
    }

    /// A device's work: the first unused buffers are filled, a batch at a time.
    fn serve(&mut self, device: &mut DeviceQueue, rounds: usize) {
        for round in 0..rounds {
            let mut batch = Batch::default();
            device.peek(&mut batch, 1 + round % 4).unwrap();
            // What lay in a gap goes back before the rest is looked at.
            self.take();
            device.consume(&batch.chains);
            let data = self.memory.translate(&mut Default::default(), DATA, 1).unwrap().as_ptr() as usize;
            for (chain, number) in batch.chains.iter().zip(self.returned..) {
                let place = batch.writable(chain)[0].as_ptr() as usize - data;
                assert_eq!(place as u64, 256 * (number % 1000), "the first that has not come back");
                device.complete(chain, WRITTEN);
            }
            device.publish();
            self.take();
            self.add(u32::MAX);
            self.publish();
        }
    }
}

/// A device serves the ring for a while and is killed, and so is the next; in between the driver writes up to `staged`
/// descriptors that it does not publish. Returns whether the first was killed before it was done.
fn two_deaths(memory: &GuestMemory, size: u32, start: u64, staged: u32, lives: [u32; 2]) -> bool {
    let mut scene = Scene::new(memory, size);
    for _ in 0..start {
        scene.add(scene.longest as u32);
        scene.publish();
        let mut device = scene.device();
        scene.serve(&mut device, 1);
    }
    scene.add(u32::MAX);
    scene.publish();
    let deaths = lives.map(|life| {
        let killed = is_killed(life, || {
            let mut device = scene.device();
            scene.publish();
            scene.serve(&mut device, 6);
        });
        scene.take();
        scene.publish();
        scene.add(staged.min(size - 1));
        killed
    });
    let mut device = scene.device();
    scene.publish();
    let before = scene.empty;
    scene.serve(&mut device, 4 * size as usize);
    assert!(scene.empty - before <= 4, "only what was not shown is given up");
    // The device gets the rest, and nothing is left.
    while scene.returned < scene.added {
        let left = scene.returned;
        let mut batch = Batch::default();
        device.peek(&mut batch, 8).unwrap();
        device.consume(&batch.chains);
        batch.chains.iter().for_each(|chain| device.complete(chain, WRITTEN));
        device.publish();
        scene.take();
        assert!(scene.returned > left, "lost: {} to {}", scene.returned, scene.added);
    }
    assert_eq!((scene.driver.free(), device.base()), (size as usize, scene.driver.base()));
    deaths[0]
}

#[test]
fn a_packed_device_without_a_record_may_die_anywhere() {
    let memory = GuestMemory::allocate(1 << 20).unwrap();
    for size in [1, 3, 4, 5, 8] {
        for start in [0, 1, 4, 7, 11] {
            for staged in [0, 2, 3, 7] {
                let mut life = 0;
                // The second dies while it gives back what the first left, or soon after.
                while two_deaths(&memory, size, start, staged, [life, life * 7 % 23]) {
                    life += 1;
                }
                assert!(life > 5, "the device made only {life} stores");
            }
        }
    }
}
