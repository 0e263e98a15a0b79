//! Sends a number of frames through the switch, from one station to another, in a fixed order of events: for counting
//! the instructions that a frame costs (`python -m bench.instructions`).
//!
//! ```text
//! forward_frames split|packed MERGEABLE(0|1) SIZE ROUNDS
//! ```
//!
//! A round is a full ring of frames. The poller sleeps until a round is announced and has nothing to do when it is over,
//! so how often it looks in vain does not depend on the machine. The poller's thread is the process's second one.

use std::error::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_ring::{DeviceQueue, DriverQueue, Layout, QueueConfig};
use viaduct_switch::{Polling, PortConfig, Switch, VhostQueue, VlanMode};

const RING: u32 = 256;
const BUFFER: u64 = 2048;
const HEADER: usize = 12;
/// Places of the two queues' rings and buffers in a station's memory.
const RINGS: [u64; 2] = [0, 0x10000];
const BUFFERS: [u64; 2] = [0x10_0000, 0x20_0000];
const MEMORY: u64 = 0x30_0000;

struct Station {
    memory: GuestMemory,
    receive: DriverQueue,
    transmit: DriverQueue,
    kick: OwnedFd,
}

fn event_fd(flags: i32) -> Result<OwnedFd, std::io::Error> {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor, taken over at once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn write_u64(fd: &OwnedFd, value: u64) {
    // SAFETY: writes a local to a descriptor of ours.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const value).cast(), 8) };
}

/// Sleeps until the eventfd is signalled.
fn wait(fd: &OwnedFd) {
    let mut value = 0u64;
    // SAFETY: reads into a local from a descriptor of ours.
    unsafe { libc::read(fd.as_raw_fd(), (&raw mut value).cast(), 8) };
}

impl Station {
    /// A station on a port of its own. `called` is signalled when frames have arrived.
    fn plug(switch: &Switch, layout: Layout, mergeable: bool, called: &OwnedFd) -> Result<Station, Box<dyn Error>> {
        let port = PortConfig { name: "station".into(), vlan: VlanMode::All, max_frame: 0, pairs: 1 };
        let port = switch.add_port(port)?;
        let memory = GuestMemory::allocate(MEMORY)?;
        let config = |ring: u64| QueueConfig {
            layout,
            size: RING,
            descriptor_addr: ring,
            driver_addr: ring + 0x4000,
            device_addr: ring + 0x8000,
            base: if layout == Layout::Packed { 0x8000_8000 } else { 0 },
            event_idx: false,
            indirect: false,
            in_order: false,
        };
        let kick = event_fd(libc::EFD_NONBLOCK)?;
        let driver = |ring| DriverQueue::new(memory.clone(), &config(ring));
        let mut station =
            Station { receive: driver(RINGS[0])?, transmit: driver(RINGS[1])?, memory: memory.clone(), kick };
        station.post(RING)?;
        for index in 0..2u16 {
            let queue = VhostQueue {
                queue: DeviceQueue::new(memory.clone(), &config(RINGS[usize::from(index)]))?,
                kick: Some(station.kick.try_clone()?),
                call: if index == 0 { Some(called.try_clone()?) } else { None },
                enabled: true,
                header_len: HEADER as u32,
                mergeable,
            };
            switch.start_queue(port, index, queue)?;
        }
        Ok(station)
    }

    fn post(&mut self, buffers: u32) -> Result<(), Box<dyn Error>> {
        for buffer in 0..u64::from(buffers) {
            self.receive.add(&[], &[(BUFFERS[0] + buffer * BUFFER, BUFFER as u32)], buffer)?;
        }
        self.receive.publish();
        Ok(())
    }

    /// Puts `count` frames into the transmit ring and announces them together.
    fn send(&mut self, frame: &[u8], count: u32) -> Result<(), Box<dyn Error>> {
        for buffer in 0..u64::from(count) {
            let addr = BUFFERS[1] + buffer * BUFFER;
            let len = (HEADER + frame.len()) as u32;
            let span = self.memory.translate(&mut RegionCache::default(), addr, len).ok_or("buffers are in memory")?;
            // SAFETY: `self` keeps the memory alive.
            unsafe { span.write(HEADER as u32, frame) };
            self.transmit.add(&[(addr, len)], &[], buffer)?;
        }
        if self.transmit.publish() {
            write_u64(&self.kick, 1);
        }
        Ok(())
    }

    /// Takes what has arrived and what was given back, and posts as many buffers as have been used.
    fn collect(&mut self) -> Result<u32, Box<dyn Error>> {
        while self.transmit.take()?.is_some() {}
        let mut frames = 0;
        while self.receive.take()?.is_some() {
            frames += 1;
        }
        self.post(frames)?;
        Ok(frames)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [layout, mergeable, size, rounds] = arguments.as_slice() else {
        return Err("usage: forward_frames split|packed 0|1 SIZE ROUNDS".into());
    };
    let layout = if layout == "packed" { Layout::Packed } else { Layout::Split };
    let (mergeable, size, rounds) = (mergeable == "1", size.parse::<usize>()?, rounds.parse::<u32>()?);
    let (events, called) = (event_fd(libc::EFD_NONBLOCK)?, event_fd(0)?);
    let switch = Switch::new(&[None], Polling::Interrupt, events)?;
    let mut a = Station::plug(&switch, layout, mergeable, &called)?;
    let mut b = Station::plug(&switch, layout, mergeable, &called)?;
    let frame = |to: u8, from: u8| {
        let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
        frame.resize(size, 0x5a);
        frame
    };
    // Each hears the other once, so that nothing is flooded after this.
    b.send(&frame(1, 2), 1)?;
    wait(&called);
    a.collect()?;
    let (forth, mut arrived) = (frame(2, 1), 0);
    for _ in 0..rounds {
        a.send(&forth, RING)?;
        let mut missing = RING;
        while missing > 0 {
            wait(&called);
            missing -= b.collect()?;
        }
        // The last buffers may come back after the frames have arrived.
        while a.transmit.free() < RING as usize {
            a.collect()?;
            std::thread::yield_now();
        }
        arrived += RING;
    }
    println!("{arrived} frames");
    Ok(())
}
