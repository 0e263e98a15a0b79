//! A guest whose second processor rewrites descriptors, indexes, headers and contents while the switch works on them: what
//! arrives elsewhere is made of that guest's own buffers, nothing outside of its memory is written, and others do not notice.
//!
//! The guest's memory is a part of a file, in the middle of its pages: what lies before and behind it in the same pages is
//! mapped as well and filled with a mark. Buffers hold bytes of a small alphabet only, the mark is none of them, and so are
//! most bytes of rings, counters and everybody else's memory. Whatever is read beyond its place shows.

mod station;

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use station::{BROADCAST, Options, Station, event_fd, frame, mac, switch};
use viaduct_memory::{GuestMemory, Mapping, RegionSpec};
use viaduct_ring::{DeviceQueue, Layout, PACKED_START, QueueConfig};
use viaduct_switch::{PortConfig, Switch, VhostQueue, VlanMode};

/// Bytes of marks at either end.
const GUARD: u64 = 2048;
const SIZE: u64 = (1 << 20) - 2 * GUARD;
const MARK: u8 = 0xee;
/// Of the two rings, from the start of memory; in each the driver's part, the device's part and indirect tables.
const RINGS: [u64; 2] = [0, 0x10000];
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x4000;
const TABLES: u64 = 0x6000;
/// Where receive buffers lie, and where the frames are that are sent.
const INBOX: u64 = 0x20000;
const OUTBOX: u64 = 0x60000;
const DESCRIPTORS: u16 = 64;
/// The first of them always refer to a table, and no others do: else a table would be sent now and then as if it were a
/// buffer, by a descriptor of which one half is old, and its bytes would look as if they were somebody else's.
const INDIRECT_SLOTS: u64 = 4;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Frames that are looked at.
const FRAMES: usize = 500;

/// Bytes of buffers: mostly zero, so that virtio-net headers are accepted, and never odd, so that no source is a group.
const ALPHABET: [u8; 8] = [0, 0, 0, 0, 0x52, 0x54, 0x58, 0x5c];

/// Marsaglia's xorshift.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn letters(&mut self) -> u64 {
        let word = self.next();
        u64::from_le_bytes(std::array::from_fn(|at| ALPHABET[(word >> (8 * at + 3)) as usize & 7]))
    }
}

/// The racing guest: its memory as the switch has it, and the whole file, marks included.
struct Racer {
    memory: GuestMemory,
    file: Mapping,
    layout: Layout,
}

impl Racer {
    fn new(layout: Layout) -> Racer {
        // SAFETY: a fresh descriptor, taken over at once.
        let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"racer".as_ptr(), libc::MFD_CLOEXEC)) };
        std::fs::File::from(file.try_clone().expect("a descriptor")).set_len(SIZE + 2 * GUARD).expect("it can grow");
        let half = (SIZE / 2) & !0xfff;
        let region = |start: u64, end: u64| RegionSpec {
            guest_addr: start,
            size: end - start,
            user_addr: start,
            mmap_offset: GUARD + start,
        };
        let copy = || file.try_clone().expect("a descriptor");
        // Two regions, so that buffers cross from one into the other.
        let memory = GuestMemory::new().with_region(region(0, half), copy()).expect("a legal region");
        let memory = memory.with_region(region(half, SIZE), copy()).expect("a legal region");
        let file = Mapping::new(file.as_fd(), 0, SIZE + 2 * GUARD).expect("a legal mapping");
        let racer = Racer { memory, file, layout };
        let mut chance = Chance(1);
        for at in (0..SIZE).step_by(8) {
            racer.put_u64(at, if at < INBOX { 0 } else { chance.letters() });
        }
        for slot in RINGS.into_iter().flat_map(|ring| (0..INDIRECT_SLOTS).map(move |slot| ring + 16 * slot)) {
            racer.indirect(&mut chance, slot);
        }
        for at in (0..GUARD).chain(GUARD + SIZE..2 * GUARD + SIZE) {
            // SAFETY: in the mapping, which nobody else uses yet.
            unsafe { racer.file.as_ptr().add(at as usize).write_volatile(MARK) };
        }
        racer
    }

    fn at<T>(&self, addr: u64) -> *mut T {
        assert!(addr + size_of::<T>() as u64 <= SIZE);
        self.file.as_ptr().wrapping_add((GUARD + addr) as usize).cast()
    }

    fn put_u64(&self, addr: u64, value: u64) {
        // SAFETY: in the mapping; a guest writes when it likes.
        unsafe { self.at::<u64>(addr).write_volatile(value) };
    }

    fn put_u16(&self, addr: u64, value: u16) {
        // SAFETY: as above.
        unsafe { self.at::<u16>(addr).write_volatile(value) };
    }

    fn get_u16(&self, addr: u64) -> u16 {
        // SAFETY: as above.
        unsafe { self.at::<u16>(addr).read_volatile() }
    }

    fn check_marks(&self) {
        for at in (0..GUARD).chain(GUARD + SIZE..2 * GUARD + SIZE) {
            // SAFETY: in the mapping.
            let found = unsafe { self.file.as_ptr().add(at as usize).read_volatile() };
            assert_eq!(found, MARK, "byte {at:#x} of the file is outside of the guest's memory");
        }
    }

    fn config(&self, index: u16) -> QueueConfig {
        let ring = RINGS[usize::from(index)];
        QueueConfig {
            layout: self.layout,
            size: DESCRIPTORS.into(),
            descriptor_addr: ring,
            driver_addr: ring + DRIVER,
            device_addr: ring + DEVICE,
            base: match self.layout {
                Layout::Split => self.get_u16(ring + DEVICE + 2).into(),
                Layout::Packed => PACKED_START,
            },
            event_idx: true,
            indirect: true,
            in_order: false,
        }
    }

    fn start(&self, switch: &Switch, port: u16, index: u16, kick: &OwnedFd) {
        let queue = DeviceQueue::new(self.memory.clone(), &self.config(index)).expect("a legal queue");
        let kick = kick.try_clone().ok();
        let start = VhostQueue { queue, kick, call: None, enabled: true, header_len: 12, mergeable: true };
        switch.start_queue(port, index, start).expect("the port is there");
    }

    /// Address and length: mostly of a buffer, now and then across the end of memory, or far away.
    fn buffer(&self, chance: &mut Chance, receive: bool) -> (u64, u16) {
        let (start, end) = if receive { (INBOX, OUTBOX) } else { (OUTBOX, SIZE - 64) };
        let len = [12, 26, 60, 100, 1526, 4000][chance.below(6) as usize];
        match (chance.below(1024), receive) {
            (0, _) => (chance.next() | 1 << 40, len),
            // A header and some of the frame before the end of memory, so that the frame would be delivered.
            (1, false) => (SIZE - 27 - chance.below(36), 100),
            // Even the shortest ends behind it. A packed ring's device writes lengths, which may be shorter.
            (1, true) if self.layout == Layout::Split => (SIZE - 1 - chance.below(11), len),
            _ => (start + chance.below(end - start - 4000), len),
        }
    }

    /// A descriptor of a buffer, in a ring or table. Each field for itself, as another processor may see them.
    fn descriptor(&self, chance: &mut Chance, at: u64, receive: bool) {
        let (addr, len) = self.buffer(chance, receive);
        let mut flags = if receive { WRITE } else { 0 };
        if chance.one_in(16) {
            flags |= NEXT;
        }
        if chance.one_in(512) {
            flags = chance.next() as u16 & (NEXT | WRITE);
        }
        self.put_u64(at, addr);
        self.put_u16(at + 8, len);
        self.put_u16(at + 10, 0);
        self.finish(chance, at, flags);
    }

    /// A descriptor of the table that goes with its ring.
    fn indirect(&self, chance: &mut Chance, at: u64) {
        let next = if chance.one_in(64) { NEXT } else { 0 };
        self.finish(chance, at, INDIRECT | next);
        self.put_u64(at, at & !0xffff | TABLES);
        self.put_u16(at + 8, 16 * (1 + chance.below(8) as u16));
        self.put_u16(at + 10, 0);
    }

    /// Index and flags, all of them but the bits by which a packed ring shows what is available.
    fn finish(&self, chance: &mut Chance, at: u64, flags: u16) {
        let index = chance.below(DESCRIPTORS.into()) as u16;
        match self.layout {
            Layout::Split => {
                self.put_u16(at + 12, flags);
                self.put_u16(at + 14, index);
            }
            Layout::Packed => {
                self.put_u16(at + 12, index);
                self.put_u16(at + 14, self.get_u16(at + 14) & (AVAIL | USED) | flags);
            }
        }
    }

    /// One thing that the second processor does.
    fn race(&self, chance: &mut Chance) {
        let receive = chance.one_in(2);
        let ring = RINGS[usize::from(!receive)];
        let slot = chance.below(DESCRIPTORS.into());
        match chance.below(8) {
            0 | 1 if slot < INDIRECT_SLOTS => self.indirect(chance, ring + 16 * slot),
            0 | 1 => self.descriptor(chance, ring + 16 * slot, receive),
            2 => {
                let entry = chance.below(8);
                self.descriptor(chance, ring + TABLES + 16 * entry, receive);
            }
            3 | 4 => self.put_u64((OUTBOX + chance.below(SIZE - OUTBOX - 8)) & !7, chance.letters()),
            _ => self.make_available(chance, ring),
        }
    }

    fn make_available(&self, chance: &mut Chance, ring: u64) {
        let slot = chance.below(DESCRIPTORS.into());
        match self.layout {
            Layout::Split => {
                self.put_u16(ring + DRIVER + 4 + 2 * slot, chance.below(DESCRIPTORS.into()) as u16);
                let used = self.get_u16(ring + DEVICE + 2);
                self.put_u16(ring + DRIVER + 2, used.wrapping_add(chance.below(DESCRIPTORS.into()) as u16));
            }
            Layout::Packed => {
                for slot in 0..u64::from(DESCRIPTORS) {
                    let at = ring + 16 * slot + 14;
                    // What the device has written over it no longer says that there is a table.
                    let flags = self.get_u16(at) | if slot < INDIRECT_SLOTS { INDIRECT } else { 0 };
                    // Used, or never available: available in the lap that follows (virtio 1.2, 2.8.1).
                    if (flags & AVAIL != 0) == (flags & USED != 0) {
                        self.put_u16(at, flags ^ AVAIL);
                    } else if chance.one_in(8) {
                        // The two processors overwrote each other's marks, and wait for each other; or they will.
                        self.put_u16(at, flags ^ (AVAIL | USED));
                    }
                }
            }
        }
    }
}

fn kick(fd: &OwnedFd) {
    use std::os::fd::AsRawFd;
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes a local to our own descriptor.
    unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

fn race(layout: Layout) {
    let switch = switch(1);
    let racer = Racer::new(layout);
    let access = |vlan| Options { vlan: VlanMode::Access(vlan), ..Options::default() };
    let mut a = Station::plug(&switch, access(7));
    let mut b = Station::plug(&switch, access(7));
    let mut witness = Station::plug(&switch, access(9));
    let config = PortConfig { vlan: VlanMode::Access(9), pairs: 1, ..PortConfig::default() };
    let port = switch.add_port(config).expect("there is room");
    let kick_fd = event_fd();
    for index in 0..2 {
        racer.start(&switch, port, index, &kick_fd);
    }
    let stop = AtomicBool::new(false);
    let deadline = Instant::now() + Duration::from_secs(300);
    std::thread::scope(|scope| {
        // Also when a check fails: the scope waits for the thread.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let _stop = Stop(&stop);
        scope.spawn(|| {
            let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
            while !stop.load(Relaxed) {
                for _ in 0..64 {
                    racer.race(&mut chance);
                }
                kick(&kick_fd);
            }
        });
        let (mut seen, mut restarts, mut seed) = (0, 0, 0u8);
        while seen < FRAMES {
            assert!(Instant::now() < deadline, "{seen} frames after {restarts} restarts");
            while let Some((_, bytes)) = witness.poll() {
                let strange = bytes.iter().position(|byte| !ALPHABET.contains(byte));
                if let Some(at) = strange {
                    let near = &bytes[at.saturating_sub(8)..bytes.len().min(at + 24)];
                    panic!("bytes that are in none of the sender's buffers, at {at} of {}: {near:02x?}", bytes.len());
                }
                seen += 1;
            }
            // It breaks its queues now and then; a driver that resets its device may go on.
            for event in switch.take_events() {
                restarts += 1;
                assert_eq!(event.port, port, "an honest port is broken: {}", event.message);
                switch.stop_queue(port, event.queue).expect("the port is there");
                racer.start(&switch, port, event.queue, &kick_fd);
            }
            // Something for it to receive, and the others go on.
            seed = seed.wrapping_add(1);
            let sent = frame(BROADCAST, mac(3), 300, seed);
            witness.send(&sent);
            witness.reclaim();
            let sent = frame(BROADCAST, mac(1), 200, seed);
            a.send(&sent);
            b.expect(&sent);
            a.reclaim();
        }
    });
    drop(switch);
    racer.check_marks();
}

#[test]
fn split_rings_rewritten_while_they_run() {
    race(Layout::Split);
}

#[test]
fn packed_rings_rewritten_while_they_run() {
    race(Layout::Packed);
}
