//! A guest for tests: memory of its own, a receive and a transmit queue, and a driver that is told what to do.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_ring::{DeviceQueue, DriverQueue, Layout, QueueConfig};
use viaduct_switch::net_header::NetHeader;
use viaduct_switch::{Offloads, Polling, PortConfig, PortStats, Switch, VhostQueue, VlanMode};

pub const MEMORY: u64 = 4 << 20;
/// Where buffers of the two queues begin; rings lie below.
const RECEIVE_BUFFERS: u64 = 1 << 20;
const TRANSMIT_BUFFERS: u64 = 2 << 20;
const RINGS: [u64; 2] = [0, 0x40000];

#[derive(Clone)]
pub struct Options {
    pub layout: Layout,
    pub size: u32,
    pub mergeable: bool,
    pub header_len: usize,
    pub buffer: u32,
    pub buffers: u32,
    pub vlan: VlanMode,
    pub accepts: Offloads,
    pub max_frame: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            layout: Layout::Split,
            size: 256,
            mergeable: true,
            header_len: 12,
            buffer: 2048,
            buffers: 256,
            vlan: VlanMode::All,
            accepts: Offloads::NONE,
            max_frame: 0,
        }
    }
}

pub fn event_fd() -> OwnedFd {
    // SAFETY: a fresh descriptor, taken over at once.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) }
}

pub fn switch(pollers: usize) -> Switch {
    Switch::new(&vec![None; pollers], Polling::Adaptive, event_fd()).expect("pollers start")
}

pub struct Station {
    pub port: u16,
    pub memory: GuestMemory,
    pub receive: DriverQueue,
    pub transmit: DriverQueue,
    pub kick: OwnedFd,
    options: Options,
    sent: u64,
}

pub fn config(options: &Options, ring: u64) -> QueueConfig {
    QueueConfig {
        layout: options.layout,
        size: options.size,
        descriptor_addr: ring,
        driver_addr: ring + 0x20000,
        device_addr: ring + 0x30000,
        base: if options.layout == Layout::Packed { 0x8000_8000 } else { 0 },
        event_idx: false,
        indirect: false,
        in_order: false,
    }
}

impl Station {
    /// A station on a port of its own, with its receive buffers posted.
    pub fn plug(switch: &Switch, options: Options) -> Station {
        let (vlan, max_frame) = (options.vlan.clone(), options.max_frame);
        let port = switch
            .add_port(PortConfig { name: "station".into(), vlan, max_frame, pairs: 1 })
            .expect("there is room for a port");
        switch.set_accepted(port, options.accepts).expect("the port is there");
        let memory = GuestMemory::allocate(MEMORY).expect("memory");
        let [receive, transmit] =
            RINGS.map(|ring| DriverQueue::new(memory.clone(), &config(&options, ring)).expect("a legal queue"));
        let mut station = Station { port, memory, receive, transmit, kick: event_fd(), options, sent: 0 };
        for buffer in 0..u64::from(station.options.buffers) {
            station.post(buffer);
        }
        station.receive.publish();
        station.start(switch);
        station
    }

    pub fn start(&self, switch: &Switch) {
        for index in 0..2u16 {
            let queue = DeviceQueue::new(self.memory.clone(), &config(&self.options, RINGS[usize::from(index)]));
            let queue = VhostQueue {
                queue: queue.expect("a legal queue"),
                kick: Some(self.kick.try_clone().expect("a descriptor")),
                call: None,
                enabled: true,
                header_len: self.options.header_len as u32,
                mergeable: self.options.mergeable,
            };
            switch.start_queue(self.port, index, queue).expect("the port is there");
        }
    }

    fn post(&mut self, buffer: u64) {
        let addr = RECEIVE_BUFFERS + buffer * u64::from(self.options.buffer);
        self.receive.add(&[], &[(addr, self.options.buffer)], buffer).expect("a legal buffer");
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let span = self.memory.translate(&mut RegionCache::default(), addr, bytes.len() as u32).expect("in memory");
        // SAFETY: `self` keeps the memory alive.
        unsafe { span.write(0, bytes) };
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let span = self.memory.translate(&mut RegionCache::default(), addr, len as u32).expect("in memory");
        // SAFETY: `self` keeps the memory alive.
        unsafe { span.read(0, &mut bytes) };
        bytes
    }

    /// Transmits a frame as buffers of the given sizes, header included; the last one takes the rest.
    pub fn send_in_pieces(&mut self, header: NetHeader, frame: &[u8], pieces: &[usize]) {
        let mut bytes = header.encode()[..self.options.header_len].to_vec();
        bytes.extend_from_slice(frame);
        // Slots of 128 KB, used in turn.
        let base = TRANSMIT_BUFFERS + (self.sent % 15) * 0x20000;
        self.sent += 1;
        let mut at = 0;
        let mut segments = Vec::new();
        for &piece in pieces.iter().chain([&usize::MAX]) {
            let end = at + piece.min(bytes.len() - at);
            if end > at {
                let addr = base + 2 * at as u64;
                self.write(addr, &bytes[at..end]);
                segments.push((addr, (end - at) as u32));
            }
            at = end;
        }
        assert!(self.transmit.add(&segments, &[], 0).expect("a legal chain"), "the ring has room");
        if self.transmit.publish() {
            self.kick();
        }
    }

    pub fn kick(&self) {
        use std::os::fd::AsRawFd;
        // SAFETY: writes a local to our descriptor.
        unsafe { libc::write(self.kick.as_raw_fd(), (&raw const ONE).cast(), 8) };
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.send_in_pieces(NetHeader::default(), frame, &[]);
    }

    /// Waits until all that was sent is given back.
    pub fn reclaim(&mut self) {
        until(|| {
            while self.transmit.take().expect("a legal ring").is_some() {}
            (self.transmit.free() == self.options.size as usize).then_some(())
        });
    }

    /// The next frame, if one comes within a minute. Its buffers are posted again.
    pub fn receive(&mut self) -> Option<(NetHeader, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(frame) = self.poll() {
                return Some(frame);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::yield_now();
        }
    }

    /// The next frame, if it is there.
    pub fn poll(&mut self) -> Option<(NetHeader, Vec<u8>)> {
        let (first, written) = self.receive.take().expect("a legal ring")?;
        let mut bytes = self.take_buffer(first, written);
        let mut header = [0; 12];
        header[..self.options.header_len].copy_from_slice(&bytes[..self.options.header_len]);
        let header = NetHeader::parse(&header);
        for _ in 1..header.num_buffers {
            let (next, written) = self.receive.take().expect("a legal ring").expect("published with the first");
            bytes.extend(self.take_buffer(next, written));
        }
        self.receive.publish();
        Some((header, bytes.split_off(self.options.header_len)))
    }

    fn take_buffer(&mut self, buffer: u64, written: u32) -> Vec<u8> {
        let bytes = self.read(RECEIVE_BUFFERS + buffer * u64::from(self.options.buffer), written as usize);
        self.post(buffer);
        bytes
    }

    /// Expects the next frame to be this one, untouched by offloads.
    pub fn expect(&mut self, frame: &[u8]) {
        let (header, received) = self.receive().expect("a frame arrives");
        assert_eq!((header.flags, header.gso_type), (0, 0));
        assert_eq!(received, frame);
    }
}

static ONE: u64 = 1;

/// More than a machine that does a lot else needs for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Polls until there is an answer; panics after a minute.
pub fn until<R>(mut ready: impl FnMut() -> Option<R>) -> R {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ready() {
            return answer;
        }
        assert!(Instant::now() < deadline, "nothing happened for a minute");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Waits for the poller to have been through everything: an own frame that it must have handled after the others.
pub fn stats(switch: &Switch, port: u16) -> PortStats {
    switch.port_stats().into_iter().find(|stats| stats.number == port).expect("the port is there")
}

pub const fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

pub const BROADCAST: [u8; 6] = [0xff; 6];

/// A frame of `len` bytes whose content depends on `seed`.
pub fn frame(to: [u8; 6], from: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x88, 0xb5]].concat();
    frame.extend((frame.len()..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)));
    frame
}

/// The same with an 802.1Q tag.
pub fn tagged(frame: &[u8], tci: u16) -> Vec<u8> {
    [&frame[..12], &[0x81, 0], &tci.to_be_bytes(), &frame[12..]].concat()
}
