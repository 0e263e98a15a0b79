//! A fixed load for counting instructions: two guests in this process send frames to each other through a real switch.
//!
//! ```text
//! cargo build --release -p viaduct-switch --example forward
//! valgrind --tool=callgrind --toggle-collect='*Forwarder::forward*' target/release/examples/forward split 64 20000
//! ```
//!
//! Arguments: `split` or `packed`, frame size, number of frames, and optionally `scattered` (header and frame in buffers
//! of their own), `unmergeable` (each frame in one receive buffer) and `macs=N` (source addresses, up to 65,536). Prints
//! the number of frames that arrived; whatever the machine is doing meanwhile, the instructions that the switch spends on
//! each are the same.

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};

use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_ring::{DeviceQueue, DriverQueue, Layout, QueueConfig};
use viaduct_switch::{Polling, PortConfig, Switch, VhostQueue};

const BATCH: u64 = 32;
const QUEUE: u32 = 256;
const BUFFER: u64 = 2048;
const HEADER: u64 = 12;
/// Where in a frame the last two bytes of its source address are.
const SOURCE_END: u64 = 10;

struct Guest {
    memory: GuestMemory,
    receive: DriverQueue,
    transmit: DriverQueue,
    kick: File,
}

fn config(layout: Layout, ring: u64) -> QueueConfig {
    QueueConfig {
        layout,
        size: QUEUE,
        descriptor_addr: ring,
        driver_addr: ring + 0x4000,
        device_addr: ring + 0x8000,
        base: if layout == Layout::Packed { 0x8000_8000 } else { 0 },
        event_idx: false,
        indirect: false,
        in_order: false,
    }
}

fn event_fd() -> OwnedFd {
    // SAFETY: a fresh descriptor, taken over at once.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) }
}

impl Guest {
    fn plug(switch: &Switch, layout: Layout, mergeable: bool) -> Guest {
        let port = switch.add_port(PortConfig { pairs: 1, ..PortConfig::default() }).expect("room for a port");
        let memory = GuestMemory::allocate(4 << 20).expect("memory");
        let queue = |ring| DriverQueue::new(memory.clone(), &config(layout, ring)).expect("a legal queue");
        let mut guest =
            Guest { receive: queue(0), transmit: queue(0x10000), memory: memory.clone(), kick: event_fd().into() };
        for buffer in 0..u64::from(QUEUE) {
            guest.receive.add_single((1 << 20) + buffer * BUFFER, BUFFER as u32, true, buffer);
        }
        guest.receive.publish();
        for index in 0..2u16 {
            let queue = DeviceQueue::new(memory.clone(), &config(layout, 0x10000 * u64::from(index)));
            let queue = queue.expect("a legal queue");
            let kick = guest.kick.try_clone().map(OwnedFd::from).ok();
            let start = VhostQueue { queue, kick, call: None, enabled: true, header_len: 12, mergeable };
            switch.start_queue(port, index, start).expect("the port is there");
        }
        guest
    }

    fn write(&self, addr: u64, bytes: &[u8]) {
        let span = self.memory.translate(&mut RegionCache::default(), addr, bytes.len() as u32).expect("in memory");
        // SAFETY: `self` keeps the memory alive.
        unsafe { span.write(0, bytes) };
    }

    /// Shows the switch what was added. The poller sleeps between batches, so that no empty look at the ring is counted.
    fn publish(&mut self) {
        self.transmit.publish();
        self.kick.write_all(&1u64.to_ne_bytes()).expect("an eventfd");
    }

    /// Takes what has arrived and posts the buffers again. Returns how many.
    fn drain(&mut self) -> u64 {
        let mut count = 0;
        while let Some((buffer, _)) = self.receive.take().expect("a legal ring") {
            self.receive.add_single((1 << 20) + buffer * BUFFER, BUFFER as u32, true, buffer);
            count += 1;
        }
        self.receive.publish();
        while self.transmit.take().expect("a legal ring").is_some() {}
        count
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut next = |default: &str| arguments.next().unwrap_or_else(|| default.to_owned());
    let layout = if next("split") == "packed" { Layout::Packed } else { Layout::Split };
    let size: u64 = next("64").parse().expect("a frame size");
    let frames: u64 = next("20000").parse().expect("a number of frames");
    let options: Vec<String> = arguments.collect();
    let scattered = options.iter().any(|option| option == "scattered");
    let mergeable = !options.iter().any(|option| option == "unmergeable");
    let macs = options.iter().find_map(|option| option.strip_prefix("macs=")?.parse().ok()).unwrap_or(1u64);

    let switch = Switch::new(&[None], Polling::Interrupt, event_fd()).expect("a poller");
    let [mut a, mut b] = [(); 2].map(|()| Guest::plug(&switch, layout, mergeable));
    for slot in 0..u64::from(QUEUE) {
        let at = (2 << 20) + slot * BUFFER;
        a.write(at, &[0; HEADER as usize]);
        a.write(at + HEADER, &[2, 0, 0, 0, 1, 1, 2, 0, 0, 1, 0, 0, 0x88, 0xb5]);
    }
    // The receiver announces itself, or everything would be flooded.
    b.write(2 << 20, &[0; HEADER as usize]);
    b.write((2 << 20) + HEADER, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 1, 1, 0x88, 0xb5]);
    b.transmit.add_single(2 << 20, (HEADER + 60) as u32, false, 0);
    b.publish();
    while a.drain() == 0 {
        std::thread::yield_now();
    }
    let (mut sent, mut received) = (0, 0);
    while received < frames {
        // One batch at a time, so that every run sees the same batches.
        for _ in 0..BATCH {
            let at = (2 << 20) + (sent % u64::from(QUEUE)) * BUFFER;
            a.write(at + HEADER + SOURCE_END, &((sent % macs) as u16).to_be_bytes());
            if scattered {
                let pieces = [(at, HEADER as u32), (at + HEADER, size as u32)];
                a.transmit.add(&pieces, &[], 0).expect("a legal chain");
            } else {
                a.transmit.add_single(at, (HEADER + size) as u32, false, 0);
            }
            sent += 1;
        }
        a.publish();
        while received < sent {
            received += b.drain();
            std::thread::yield_now();
        }
        a.drain();
    }
    println!("{received}");
}
