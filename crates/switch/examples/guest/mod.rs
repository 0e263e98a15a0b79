//! A guest of the example programs: a driver's two rings in memory of its own, plugged into a switch of this process.

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};

use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_ring::{DeviceQueue, DriverQueue, Layout, QueueConfig};
use viaduct_switch::{PortConfig, Switch, VhostQueue};

/// Length of the virtio-net header in front of each frame (Virtio 5.1.6).
pub const HEADER: u64 = 12;
/// So many buffers for each direction; rings with more descriptors use them several times.
pub const BUFFERS: u64 = 256;
const BUFFER: u64 = 2048;
const RECEIVE_RING: u64 = 0;
const TRANSMIT_RING: u64 = 1 << 20;
const RECEIVED: u64 = 2 << 20;
const TRANSMITTED: u64 = 3 << 20;
const MEMORY: u64 = 4 << 20;

pub struct Guest {
    memory: GuestMemory,
    size: u32,
    receive: DriverQueue,
    pub transmit: DriverQueue,
    kick: File,
}

/// How a guest's rings are laid out. `size` descriptors, up to 32,768.
#[derive(Clone, Copy)]
pub struct Rings {
    pub layout: Layout,
    pub size: u32,
    pub mergeable: bool,
}

fn config(rings: Rings, ring: u64) -> QueueConfig {
    QueueConfig {
        layout: rings.layout,
        size: rings.size,
        descriptor_addr: ring,
        driver_addr: ring + 0x80000,
        device_addr: ring + 0xa0000,
        base: if rings.layout == Layout::Packed { 0x8000_8000 } else { 0 },
        event_idx: false,
        indirect: false,
        in_order: false,
    }
}

pub fn event_fd() -> OwnedFd {
    // SAFETY: a fresh descriptor, taken over at once.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) }
}

/// Where the frame is that is sent as the `n`th, its header in front of it.
pub fn frame(n: u64) -> u64 {
    TRANSMITTED + n % BUFFERS * BUFFER
}

impl Guest {
    pub fn plug(switch: &Switch, rings: Rings) -> Guest {
        let port = switch.add_port(PortConfig { pairs: 1, ..PortConfig::default() }).expect("room for a port");
        let memory = GuestMemory::allocate(MEMORY).expect("memory");
        let queue = |ring| DriverQueue::new(memory.clone(), &config(rings, ring)).expect("a legal queue");
        let mut guest = Guest {
            receive: queue(RECEIVE_RING),
            transmit: queue(TRANSMIT_RING),
            memory: memory.clone(),
            size: rings.size,
            kick: event_fd().into(),
        };
        for buffer in 0..u64::from(guest.size) {
            guest.post(buffer);
        }
        guest.receive.publish();
        for (index, ring) in [(0, RECEIVE_RING), (1, TRANSMIT_RING)] {
            let queue = DeviceQueue::new(memory.clone(), &config(rings, ring)).expect("a legal queue");
            let kick = guest.kick.try_clone().map(OwnedFd::from).ok();
            let mergeable = rings.mergeable;
            let start = VhostQueue { queue, kick, call: None, enabled: true, header_len: 12, mergeable };
            switch.start_queue(port, index, start).expect("the port is there");
        }
        guest
    }

    fn post(&mut self, buffer: u64) {
        self.receive.add_single(RECEIVED + buffer % BUFFERS * BUFFER, BUFFER as u32, true, buffer);
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let span = self.memory.translate(&mut RegionCache::default(), addr, bytes.len() as u32).expect("in memory");
        // SAFETY: `self` keeps the memory alive.
        unsafe { span.write(0, bytes) };
    }

    /// Shows the switch what was added. Its poller sleeps between batches, so that it never looks at an empty ring.
    pub fn publish(&mut self) {
        self.transmit.publish();
        self.kick.write_all(&1u64.to_ne_bytes()).expect("an eventfd");
    }

    /// Takes what has arrived and posts the buffers again. Returns how many.
    pub fn drain(&mut self) -> u64 {
        let mut count = 0;
        while let Some((buffer, _)) = self.receive.take().expect("a legal ring") {
            self.post(buffer);
            count += 1;
        }
        self.receive.publish();
        while self.transmit.take().expect("a legal ring").is_some() {}
        count
    }
}
