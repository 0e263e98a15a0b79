//! Cycles per chain of the ring engine, driver and device on one processor, in batches of 32:
//!
//! ```text
//! cargo run --release -p viaduct-ring --example ring_bench
//! ```
//!
//! Rings and descriptors are in the cache, so this counts instructions, not the way of cache lines between processors.
//! The least of many rounds is printed, with the median: the one says what the code costs, the other what it cost here.

use std::hint::black_box;

use viaduct_memory::GuestMemory;
use viaduct_ring::{Batch, DeviceQueue, DriverQueue, Layout, PACKED_START, QueueConfig, RingLayout};

const BATCH: u64 = 32;
const ROUNDS: usize = 200_000;
const DATA: u64 = 1 << 20;
const TABLES: u64 = 8 << 20;

/// What a buffer looks like.
#[derive(Clone, Copy, Debug)]
enum Shape {
    /// One device-readable descriptor.
    Transmit,
    /// One device-writable descriptor.
    Receive,
    /// A header and a packet in two descriptors.
    Chain,
    /// The same in an indirect table.
    Indirect,
}

fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: reads the time stamp counter, which every x86-64 has.
    return unsafe {
        std::arch::x86_64::_mm_lfence();
        let ticks = std::arch::x86_64::_rdtsc();
        std::arch::x86_64::_mm_lfence();
        ticks
    };
    #[cfg(not(target_arch = "x86_64"))]
    return std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos() as u64);
}

/// Ticks of one part of the work, round by round.
struct Samples(Vec<u64>);

impl Samples {
    fn new() -> Samples {
        Samples(Vec::with_capacity(ROUNDS))
    }

    fn line(mut self) -> String {
        self.0.sort_unstable();
        let per_chain = |ticks: u64| ticks as f64 / BATCH as f64;
        format!("{:6.1} {:6.1}", per_chain(self.0[0]), per_chain(self.0[self.0.len() / 2]))
    }
}

fn run(layout: Layout, event_idx: bool, shape: Shape) {
    let memory = GuestMemory::allocate(16 << 20).expect("memory");
    let size = 256;
    let (descriptor_addr, driver_addr, device_addr, _) = RingLayout::new(layout, size, true).expect("size").place(0);
    let config = QueueConfig {
        layout,
        size,
        descriptor_addr,
        driver_addr,
        device_addr,
        base: if layout == Layout::Packed { PACKED_START } else { 0 },
        event_idx,
        indirect: true,
        in_order: false,
    };
    let mut driver = DriverQueue::new(memory.clone(), &config).expect("driver");
    if matches!(shape, Shape::Indirect) {
        driver.set_indirect_area(TABLES, 4 * 16 * size).expect("tables");
    }
    let mut device = DeviceQueue::new(memory, &config).expect("device");
    driver.disable_notifications();
    device.disable_notifications();
    let mut batch = Batch::with_capacity(BATCH as usize);
    let mut used = Vec::with_capacity(BATCH as usize);
    let overhead = (0..1000)
        .map(|_| {
            let t = ticks();
            ticks() - t
        })
        .min()
        .unwrap_or(0);
    let (mut add, mut peek, mut finish, mut take) = (Samples::new(), Samples::new(), Samples::new(), Samples::new());
    for _ in 0..ROUNDS {
        let t0 = ticks();
        for token in 0..BATCH {
            let addr = DATA + token * 2048;
            let added = match shape {
                Shape::Transmit => driver.add(&[(addr, 76)], &[], token),
                Shape::Receive => driver.add(&[], &[(addr, 2048)], token),
                Shape::Chain | Shape::Indirect => driver.add(&[(addr, 12), (addr + 64, 64)], &[], token),
            };
            assert_eq!(added, Ok(true));
        }
        black_box(driver.publish());
        let t1 = ticks();
        batch.clear();
        let found = device.peek(&mut batch, BATCH as usize);
        device.consume(&batch.chains);
        let t2 = ticks();
        device.complete_all(&batch.chains);
        black_box(device.publish());
        let t3 = ticks();
        used.clear();
        let taken = driver.take_many(&mut used, BATCH as usize);
        let t4 = ticks();
        assert_eq!((found, taken), (Ok(BATCH as usize), Ok(BATCH as usize)));
        for (samples, ticks) in
            [(&mut add, t1 - t0), (&mut peek, t2 - t1), (&mut finish, t3 - t2), (&mut take, t4 - t3)]
        {
            samples.0.push(ticks.saturating_sub(overhead));
        }
    }
    let name = format!("{layout:?}, {shape:?}{}", if event_idx { ", event index" } else { "" }).to_lowercase();
    println!("{name:32}{}   {}   {}   {}", peek.line(), finish.line(), add.line(), take.line());
}

fn main() {
    println!("cycles per chain, batch of {BATCH}: least and median of {ROUNDS} rounds");
    println!("{:32}{:13}   {:13}   {:13}   {:13}", "", "device peek", "complete", "driver add", "take");
    for layout in [Layout::Split, Layout::Packed] {
        for shape in [Shape::Transmit, Shape::Receive, Shape::Chain, Shape::Indirect] {
            run(layout, false, shape);
        }
        run(layout, true, Shape::Transmit);
    }
}
