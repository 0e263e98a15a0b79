//! Two virtio-net devices and a wire between them: the smallest back-end there can be, for tests of the driver.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use viaduct_guest::driver::{DriverConfig, NetDriver, QueueSetup, required_memory};
use viaduct_guest::features;
use viaduct_guest::link::LinkCounters;
use viaduct_memory::{GuestMemory, Span};
use viaduct_ring::{Batch, DeviceQueue, Layout, PACKED_START, QueueConfig, RingLayout};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const HEADER: usize = 12;

/// What is negotiated on both ends.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    pub features: u64,
    pub mtu: usize,
    pub pairs: usize,
    pub size: u32,
}

pub struct Queue {
    pub ring: DeviceQueue,
    kick: EventFd,
    call: EventFd,
}

/// The device side of one end.
pub struct Device {
    /// (receive, transmit) as the driver calls them.
    pub pairs: Vec<(Queue, Queue)>,
    mergeable: bool,
}

fn copy_of(fd: &EventFd) -> OwnedFd {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: borrowed for the call alone.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }.try_clone_to_owned().expect("a file descriptor")
}

/// A driver and its device.
pub fn end(mode: Mode, counters: &Arc<LinkCounters>) -> (NetDriver, Device) {
    let has = |bit| mode.features & bit != 0;
    let packed = has(features::RING_PACKED);
    let layout = if packed { Layout::Packed } else { Layout::Split };
    let sizes = vec![mode.size; 2 * mode.pairs];
    let size = required_memory(mode.features, mode.mtu, &sizes);
    let memory = GuestMemory::allocate(size).expect("memory");
    let parts = RingLayout::new(layout, mode.size, true).expect("a size");
    let (mut at, mut setups, mut queues) = (0, Vec::new(), Vec::new());
    for _ in &sizes {
        let (descriptor_addr, driver_addr, device_addr, end) = parts.place(at);
        at = end;
        let config = QueueConfig {
            layout,
            size: mode.size,
            descriptor_addr,
            driver_addr,
            device_addr,
            base: if packed { PACKED_START } else { 0 },
            event_idx: has(features::RING_EVENT_IDX),
            indirect: has(features::RING_INDIRECT_DESC),
            in_order: has(features::IN_ORDER),
        };
        let (kick, call) = (EventFd::new(EFD_NONBLOCK).expect("eventfd"), EventFd::new(EFD_NONBLOCK).expect("eventfd"));
        setups.push(QueueSetup { config, kick: copy_of(&kick), call: copy_of(&call) });
        queues.push((config, kick, call));
    }
    let config = DriverConfig {
        memory: memory.clone(),
        data_addr: at,
        data_end: size,
        features: mode.features | features::VERSION_1,
        mtu: mode.mtu,
        queues: setups,
    };
    let driver = NetDriver::new(config, counters.clone()).expect("a driver");
    let mut started = queues.into_iter().map(|(config, kick, call)| {
        let ring = DeviceQueue::new(memory.clone(), &config).expect("a queue");
        Queue { ring, kick, call }
    });
    let mut pairs = Vec::new();
    while let (Some(receive), Some(transmit)) = (started.next(), started.next()) {
        pairs.push((receive, transmit));
    }
    (driver, Device { pairs, mergeable: has(features::NET_MRG_RXBUF) })
}

impl Device {
    /// Frames that the driver has sent, header included, and the pair each came from.
    pub fn sent(&mut self) -> Vec<(usize, Vec<u8>)> {
        let mut frames = Vec::new();
        for (pair, (_, transmit)) in self.pairs.iter_mut().enumerate() {
            let mut batch = Batch::with_capacity(64);
            transmit.ring.peek(&mut batch, 64).expect("a good driver");
            for chain in &batch.chains {
                frames.push((pair, read(batch.readable(chain))));
            }
            transmit.ring.consume(&batch.chains);
            transmit.ring.complete_all(&batch.chains);
            if transmit.ring.publish() {
                transmit.call.write(1).expect("a call");
            }
        }
        frames
    }

    /// Gives the driver a frame with its header; `false` if there is no room.
    pub fn give(&mut self, frame: &[u8], pair: usize) -> bool {
        let (receive, _) = &mut self.pairs[pair];
        let mut batch = Batch::with_capacity(64);
        receive.ring.peek(&mut batch, 64).expect("a good driver");
        let (mut at, mut used) = (0, Vec::new());
        for chain in &batch.chains {
            let n = (frame.len() - at).min(chain.writable_len as usize);
            used.push((*chain, at, n));
            at += n;
            if at == frame.len() || !self.mergeable {
                break;
            }
        }
        if at < frame.len() {
            return false;
        }
        for (i, (chain, at, n)) in used.iter().enumerate() {
            let mut bytes = frame[*at..at + n].to_vec();
            if i == 0 {
                bytes[10..HEADER].copy_from_slice(&(used.len() as u16).to_le_bytes());
            }
            write(batch.writable(chain), &bytes);
        }
        let chains: Vec<_> = used.iter().map(|(chain, _, _)| *chain).collect();
        receive.ring.consume(&chains);
        for (chain, _, n) in &used {
            receive.ring.complete(chain, *n as u32);
        }
        if receive.ring.publish() {
            receive.call.write(1).expect("a call");
        }
        true
    }

    /// Asks for kicks; `true` if there is something to do already.
    fn arm(&mut self) -> bool {
        self.pairs.iter_mut().fold(false, |any, (_, transmit)| {
            let _ = transmit.kick.read();
            any | transmit.ring.enable_notifications()
        })
    }
}

fn read(spans: &[Span]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for span in spans {
        let at = bytes.len();
        bytes.resize(at + span.len() as usize, 0);
        // SAFETY: the queue that gave the span keeps its memory.
        unsafe { span.read(0, &mut bytes[at..]) };
    }
    bytes
}

fn write(spans: &[Span], mut bytes: &[u8]) {
    for span in spans {
        let (now, later) = bytes.split_at(bytes.len().min(span.len() as usize));
        // SAFETY: as above.
        unsafe { span.write(0, now) };
        bytes = later;
    }
}

/// Carries frames between two devices until it is dropped, and loses none: what does not fit waits.
pub struct Wire {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    pub fn new(mut left: Device, mut right: Device) -> Wire {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut there, mut back) = (VecDeque::new(), VecDeque::new());
            while !stopped.load(Ordering::Relaxed) {
                let moved = carry(&mut left, &mut right, &mut there) | carry(&mut right, &mut left, &mut back);
                if !moved && !(left.arm() | right.arm()) {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        });
        Wire { stop, thread: Some(thread) }
    }
}

/// One direction; returns whether anything moved.
fn carry(from: &mut Device, to: &mut Device, waiting: &mut VecDeque<(usize, Vec<u8>)>) -> bool {
    if waiting.is_empty() {
        waiting.extend(from.sent());
    }
    let before = waiting.len();
    while waiting.front().is_some_and(|(pair, frame)| to.give(frame, *pair)) {
        waiting.pop_front();
    }
    before != waiting.len()
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the wire");
        }
    }
}
