//! The block device with disks that a test can look into, and with drivers that no operating system has.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use viaduct_devices::block::request::{F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_WRITE_ZEROES};
use viaduct_devices::block::{BlockDevice, BlockQueue, EventKind, Format, GuestBuffer, Image};
use viaduct_memory::{Call, GuestMemory, RegionCache};
use viaduct_ring::{DeviceQueue, DriverQueue, Layout, PACKED_START, QueueConfig, RingLayout, Segment};

const SIZE: u64 = 1 << 20;
/// Where requests lie in the guest's memory.
const DATA: u64 = 4 << 20;
const TABLES: u64 = 16 << 20;
const TABLES_LEN: u32 = 8 << 20;
const FEATURES: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES;

/// A disk in memory that writes down what it is asked, and fails or gives up when told to.
#[derive(Debug, Default)]
struct Recorder {
    content: Mutex<Vec<u8>>,
    done: Mutex<Vec<String>>,
    fails: AtomicBool,
    panics: AtomicBool,
}

impl Recorder {
    fn record(&self, what: String) -> io::Result<()> {
        assert!(!self.panics.load(Ordering::Relaxed), "the disk gives up");
        self.done.lock().unwrap().push(what);
        if self.fails.load(Ordering::Relaxed) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.done.lock().unwrap())
    }
}

impl Image for Recorder {
    fn size(&self) -> u64 {
        SIZE
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn read(&self, offset: u64, data: &GuestBuffer) -> io::Result<()> {
        self.record(format!("read {offset} {}", data.len()))?;
        data.write(0, &self.content.lock().unwrap()[offset as usize..][..data.len() as usize]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &GuestBuffer) -> io::Result<()> {
        self.record(format!("write {offset} {}", data.len()))?;
        data.read(0, &mut self.content.lock().unwrap()[offset as usize..][..data.len() as usize]);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.record("flush".into())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.record(format!("discard {offset} {len}"))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.record(format!("zeroes {offset} {len} {unmap}"))
    }
}

fn event_fd() -> OwnedFd {
    // SAFETY: a fresh descriptor, taken over at once.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) }
}

/// A device with one queue, and its driver.
struct Rig {
    disk: Arc<Recorder>,
    device: BlockDevice,
    driver: DriverQueue,
    memory: GuestMemory,
    kick: Call,
}

impl Rig {
    fn new(layout: Layout, size: u32) -> Rig {
        let memory = GuestMemory::allocate(TABLES + u64::from(TABLES_LEN)).unwrap();
        let (descriptor_addr, driver_addr, device_addr, _) = RingLayout::new(layout, size, true).unwrap().place(0);
        let config = QueueConfig {
            layout,
            size,
            descriptor_addr,
            driver_addr,
            device_addr,
            base: if layout == Layout::Packed { PACKED_START } else { 0 },
            event_idx: true,
            indirect: true,
            in_order: false,
        };
        let mut driver = DriverQueue::new(memory.clone(), &config).unwrap();
        driver.set_indirect_area(TABLES, TABLES_LEN).unwrap();
        let queue = DeviceQueue::new(memory.clone(), &config).unwrap();
        let disk = Arc::new(Recorder { content: Mutex::new(vec![0; SIZE as usize]), ..Recorder::default() });
        let device = BlockDevice::new(disk.clone(), false, b"serial", event_fd(), true).unwrap();
        device.set_features(FEATURES);
        let kick = event_fd();
        let start =
            BlockQueue { queue, kick: Some(kick.try_clone().unwrap()), call: Some(Call::new(event_fd()).unwrap()) };
        device.start_queue(0, start).unwrap();
        device.enable_queue(0, true).unwrap();
        Rig { disk, device, driver, memory, kick: Call::new(kick).unwrap() }
    }

    fn put(&self, addr: u64, bytes: &[u8]) {
        let span = self.memory.translate(&mut RegionCache::default(), addr, bytes.len() as u32).unwrap();
        // SAFETY: the rig keeps the memory.
        unsafe { span.write(0, bytes) };
    }

    fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let span = self.memory.translate(&mut RegionCache::default(), addr, len as u32).unwrap();
        // SAFETY: the rig keeps the memory.
        unsafe { span.read(0, &mut bytes) };
        bytes
    }

    fn send(&mut self, out: &[Segment], input: &[Segment]) {
        assert!(self.driver.add(out, input, 1).unwrap());
        if self.driver.publish() {
            self.kick.signal();
        }
    }

    /// Waits until a request comes back, and says with how many bytes.
    fn wait(&mut self) -> u32 {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some((_, written)) = self.driver.take().unwrap() {
                return written;
            }
            assert!(Instant::now() < until, "nothing comes back");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn header(&self, kind: u32, sector: u64) -> Segment {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(DATA, &bytes);
        (DATA, 16)
    }

    /// Makes a request with `out` bytes of data to read and `input` to write, and returns its status.
    fn ask(&mut self, kind: u32, sector: u64, out: u32, input: u32) -> u8 {
        let header = self.header(kind, sector);
        let status = DATA + 0x800;
        self.put(status, &[0xee]);
        let mut outs = vec![header];
        outs.extend((out > 0).then_some((DATA + 0x1000, out)));
        let mut inputs = vec![];
        inputs.extend((input > 0).then_some((DATA + 0x1000, input)));
        inputs.push((status, 1));
        self.send(&outs, &inputs);
        self.wait();
        self.get(status, 1)[0]
    }

    fn events(&self) -> Vec<(EventKind, String)> {
        self.device.take_events().into_iter().map(|event| (event.kind, event.message)).collect()
    }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn both(test: impl Fn(Rig)) {
    for layout in [Layout::Split, Layout::Packed] {
        test(Rig::new(layout, 256));
    }
}

#[test]
fn a_write_is_durable_before_it_ends_in_write_through_mode() {
    both(|mut rig| {
        assert_eq!(rig.ask(OUT, 0, 512, 0), 0);
        assert_eq!(rig.disk.take(), ["write 0 512"]);
        rig.device.set_write_back(false).unwrap();
        assert_eq!(rig.disk.take(), ["flush"], "what was written before");
        assert_eq!(rig.ask(OUT, 2, 1024, 0), 0);
        assert_eq!(rig.disk.take(), ["write 1024 1024", "flush"]);
        assert_eq!(rig.ask(IN, 2, 0, 512), 0);
        assert_eq!(rig.disk.take(), ["read 1024 512"]);
        rig.put(DATA + 0x1000, &[0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(rig.ask(DISCARD, 0, 16, 0), 0);
        assert_eq!(rig.disk.take(), ["discard 0 4096", "flush"]);
        rig.device.set_write_back(true).unwrap();
        // A driver that does not know flushes gets none that it would have to ask for.
        rig.device.set_features(0);
        assert_eq!(rig.ask(OUT, 0, 512, 0), 0);
        assert_eq!(rig.disk.take(), ["write 0 512", "flush"]);
        assert_eq!(rig.ask(WRITE_ZEROES, 0, 16, 0), 2, "not negotiated");
    });
}

#[test]
fn a_disk_that_fails_fails_requests_and_nothing_else() {
    both(|mut rig| {
        rig.disk.fails.store(true, Ordering::Relaxed);
        for (kind, out, input) in [(IN, 0, 512), (OUT, 512, 0), (FLUSH, 0, 0)] {
            assert_eq!(rig.ask(kind, 0, out, input), 1);
        }
        rig.disk.fails.store(false, Ordering::Relaxed);
        rig.disk.panics.store(true, Ordering::Relaxed);
        for _ in 0..20 {
            assert_eq!(rig.ask(OUT, 0, 512, 0), 1);
        }
        rig.disk.panics.store(false, Ordering::Relaxed);
        assert_eq!(rig.ask(OUT, 0, 512, 0), 0);
        let events = rig.events();
        assert!(events.iter().all(|(kind, _)| *kind == EventKind::Disk), "{events:?}");
        assert!(events[0].1.contains("a read of 512 bytes at byte 0 failed"), "{events:?}");
        assert!(events[0].1.contains("see its kernel log"), "{events:?}");
        assert_eq!(rig.device.stats().failed, 23);
    });
}

#[test]
fn thousands_of_pieces_are_one_request() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut rig = Rig::new(layout, 4096);
        let header = rig.header(OUT, 8);
        let content: Vec<u8> = (0..4000u32).flat_map(|n| n.to_le_bytes()).take(15872).collect();
        rig.put(DATA + 0x1000, &content);
        // 3968 pieces of 4 bytes.
        let pieces: Vec<Segment> = (0..3968u64).map(|n| (DATA + 0x1000 + 4 * n, 4)).collect();
        let mut out = vec![header];
        out.extend(&pieces);
        rig.send(&out, &[(DATA + 0x800, 1)]);
        assert_eq!(rig.wait(), 1);
        assert_eq!(rig.get(DATA + 0x800, 1), [0]);
        assert_eq!(rig.disk.take(), ["write 4096 15872"]);
        assert_eq!(rig.disk.content.lock().unwrap()[4096..4096 + 15872], content);
        let header = rig.header(IN, 8);
        let mut input: Vec<Segment> = (0..3968u64).map(|n| (DATA + 0x10000 + 8 * n, 4)).collect();
        input.push((DATA + 0x800, 1));
        rig.send(&[header], &input);
        assert_eq!(rig.wait(), 15873);
        for (n, bytes) in content.chunks(4).enumerate() {
            assert_eq!(rig.get(DATA + 0x10000 + 8 * n as u64, 4), bytes);
        }
    }
}

#[test]
fn a_buffer_that_covers_itself_is_still_one_request() {
    both(|mut rig| {
        // The status lies in the middle of the data, and the header as well.
        let header = rig.header(IN, 0);
        rig.send(&[header], &[(DATA - 256, 512), (DATA, 1)]);
        assert_eq!(rig.wait(), 513);
        assert_eq!(rig.get(DATA, 1), [0]);
        let header = rig.header(OUT, 0);
        rig.send(&[header, (DATA, 496), (DATA, 16)], &[(DATA, 1)]);
        assert_eq!(rig.wait(), 1);
        assert_eq!(rig.disk.take().len(), 2);
    });
}

#[test]
fn a_request_without_a_place_for_its_status_is_given_back() {
    both(|mut rig| {
        let header = rig.header(FLUSH, 0);
        rig.send(&[header], &[]);
        assert_eq!(rig.wait(), 0);
        let events = rig.events();
        assert!(matches!(&events[..], [(EventKind::Request, text)] if text.contains("none to write")), "{events:?}");
        assert_eq!(rig.ask(FLUSH, 0, 0, 0), 0);
    });
}

#[test]
fn a_queue_that_stops_gives_back_what_is_in_flight() {
    both(|mut rig| {
        for _ in 0..64 {
            let header = rig.header(FLUSH, 0);
            assert!(rig.driver.add(&[header], &[(DATA + 0x800, 1)], 1).unwrap());
        }
        rig.driver.publish();
        rig.kick.signal();
        // Stopped at any moment: what was taken is back.
        rig.device.stop_queue(0).unwrap();
        let mut back = 0;
        while rig.driver.take().unwrap().is_some() {
            back += 1;
        }
        assert_eq!(back, rig.device.stats().flushes);
        assert!(rig.device.stop_queue(0).is_err(), "it is stopped");
        assert!(rig.device.set_call(0, None).is_err());
    });
}

#[test]
fn events_that_nobody_takes_do_not_pile_up() {
    both(|mut rig| {
        for _ in 0..500 {
            assert_eq!(rig.ask(99, 0, 0, 0), 2);
        }
        let events = rig.device.take_events();
        assert!(events.len() <= 32, "{}", events.len());
        assert_eq!(rig.ask(99, 0, 0, 0), 2);
        let more = rig.device.take_events();
        assert_eq!(more.iter().map(|event| event.missed).sum::<u64>(), 500 - events.len() as u64);
    });
}
