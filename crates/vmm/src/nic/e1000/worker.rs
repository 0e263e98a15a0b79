//! The thread that moves frames.
//!
//! # Theory of operation
//!
//! Two locks. That of the registers is held for moments, by vCPUs and by the worker; that of the data path by the worker
//! for a batch of at most 64 descriptors in each direction. A batch reads the registers at its beginning and writes its
//! results at its end, unless the card was reset meanwhile. A vCPU that takes memory back (a reset, or switching a
//! direction off) or changes how frames are handled changes the registers and then waits for the path's lock: when its
//! write ends, nothing is done by the old ones any more. The path's lock is taken first, if both are.
//!
//! The guest decides how far the rings go, but not what one batch does: the worker may run for as long as a guest gives it
//! work, a vCPU never waits for more than a batch.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::interrupts::Pin;
use super::receive::{self, Delivered, Unwanted};
use super::register::{self as reg, ctrl, statistics as stat, tctl};
use super::registers::Registers;
use super::traffic::Traffic;
use super::transmit::{self, Transmit};
use crate::nic::FrameEnd;
use crate::nic::dma::Dma;
use crate::pci::Pins;

/// Frames received at a time.
const BATCH: usize = 64;
/// Complaints in a card's whole life.
const COMPLAINTS: u8 = 16;

/// The data path.
pub struct Path {
    pub dma: Dma,
    pub end: Option<Box<dyn FrameEnd>>,
    pub transmit: Transmit,
    /// A frame that waits for descriptors.
    pub waiting: Option<Vec<u8>>,
    frame: Vec<u8>,
}

impl Path {
    pub fn new(dma: Dma) -> Path {
        Path { dma, end: None, transmit: Transmit::default(), waiting: None, frame: Vec::new() }
    }
}

/// What vCPUs, the worker and the owner share.
pub struct Shared {
    pub registers: Mutex<Registers>,
    pub path: Mutex<Path>,
    pub pins: OnceLock<Arc<Pins>>,
    /// Wakes the worker.
    pub doorbell: EventFd,
    pub stop: AtomicBool,
    pub paused: AtomicBool,
    pub complaints: Complaints,
}

/// What the guest did that no driver does, or what happened to the cable: for people, and so only a few times.
pub struct Complaints {
    waiting: Mutex<Option<String>>,
    /// Signalled when one waits.
    event: EventFd,
    told: AtomicU8,
}

impl Complaints {
    /// There are none yet.
    pub fn new() -> std::io::Result<Complaints> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Complaints { waiting: Mutex::default(), event, told: AtomicU8::new(0) })
    }

    /// Readable while one waits.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The one that waits; others that came meanwhile are not told.
    pub fn take(&self) -> Option<String> {
        let _ = self.event.read();
        self.waiting.lock().take()
    }

    fn add(&self, what: impl FnOnce() -> String) {
        let mut waiting = self.waiting.lock();
        let told = self.told.load(Ordering::Relaxed);
        if waiting.is_none() && told < COMPLAINTS {
            self.told.store(told + 1, Ordering::Relaxed);
            *waiting = Some(what());
            // It fails only when it is readable anyway.
            let _ = self.event.write(1);
        }
    }
}

/// What the worker waits for when there is nothing to do.
#[derive(Default)]
struct Round {
    /// There may be more to do at once.
    again: bool,
    fds: Vec<(RawFd, i16)>,
    deadline: Option<Instant>,
}

impl Shared {
    pub fn wake(&self) {
        // It fails only when it is readable anyway.
        let _ = self.doorbell.write(1);
    }

    /// Shows the state of the interrupts. Returns when to do so again, if one is due later.
    pub fn refresh(&self, registers: &mut Registers) -> Option<Instant> {
        let (high, later) = match registers.interrupts.pin(Instant::now()) {
            Pin::Low => (false, None),
            Pin::High => (true, None),
            Pin::Later(due) => (false, Some(due)),
        };
        if let Some(pins) = self.pins.get() {
            pins.set_intx(high);
        }
        later
    }

    fn complain(&self, what: impl FnOnce() -> String) {
        self.complaints.add(what);
    }

    /// The thread.
    pub fn run(&self) {
        while !self.stop.load(Ordering::Acquire) {
            // Before looking: what comes later wakes again.
            let _ = self.doorbell.read();
            let round = self.round();
            if !round.again {
                self.sleep(&round);
                if let Some(end) = self.path.lock().end.as_mut() {
                    end.awake();
                }
            }
        }
    }

    /// One round, without sleeping after it.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn step(&self) -> bool {
        self.round().again
    }

    fn sleep(&self, round: &Round) {
        let entry = |&(fd, events): &(RawFd, i16)| libc::pollfd { fd, events, revents: 0 };
        let mut fds: Vec<_> = round.fds.iter().map(entry).collect();
        fds.push(entry(&(self.doorbell.as_raw_fd(), libc::POLLIN)));
        let timeout = round.deadline.map(|due| {
            let rest = due.saturating_duration_since(Instant::now());
            // At most 17 ms (2^16 * 256 ns).
            libc::timespec { tv_sec: rest.as_secs() as i64, tv_nsec: i64::from(rest.subsec_nanos()) }
        });
        let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the array and the time are locals; no signal mask is given. A failure is looked at in the next round.
        unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout, std::ptr::null()) };
    }

    fn round(&self) -> Round {
        let mut path = self.path.lock();
        if self.paused.load(Ordering::Acquire) {
            return Round::default();
        }
        let path = &mut *path;
        if let Some(why) = path.end.as_ref().and_then(|end| end.broken()) {
            path.end = None;
            self.complain(|| format!("the card's other end is lost: {why}"));
            self.registers.lock().set_cable(false);
        }
        let sent = self.transmit(path);
        let received = self.receive(path);
        if let Some(end) = path.end.as_mut() {
            end.flush();
        }
        let deadline = self.refresh(&mut self.registers.lock());
        let mut round =
            Round { again: sent == Progress::More || received == Progress::More, fds: Vec::new(), deadline };
        if let Some(end) = path.end.as_mut()
            && !round.again
        {
            if end.prepare_to_sleep(received != Progress::Blocked, sent == Progress::Blocked) {
                round.fds = end.wake();
            } else {
                end.awake();
                round.again = true;
            }
        }
        round
    }

    fn masters_the_bus(&self) -> bool {
        self.pins.get().is_some_and(|pins| pins.bus_master())
    }

    fn transmit(&self, path: &mut Path) -> Progress {
        if !self.masters_the_bus() {
            return Progress::Nothing;
        }
        let (settings, link, generation) = {
            let registers = self.registers.lock();
            let Some(ring) = registers.transmit_ring().filter(|ring| ring.head != ring.tail) else {
                return Progress::Nothing;
            };
            let settings = transmit::Settings {
                ring,
                pad: registers.get(reg::TCTL) & tctl::PSP != 0,
                vlan: registers.get(reg::CTRL) & ctrl::VME != 0,
                vlan_type: (registers.get(reg::VET) & 0xFFFF) as u16,
            };
            (settings, registers.phy.link(), registers.generation)
        };
        let mut traffic = Traffic::default();
        let end = path.end.as_deref_mut().filter(|_| link);
        let outcome = path.transmit.run(&mut path.dma, &settings, end, &mut traffic);
        if let Some(at) = outcome.outside {
            self.complain(|| format!("transmit descriptor at {at:#x} is outside the guest's memory"));
        }
        let mut registers = self.registers.lock();
        if registers.generation != generation {
            return Progress::More;
        }
        registers.set(reg::TDH, outcome.head);
        traffic.transmitted(&mut registers);
        registers.interrupts.raise(outcome.causes);
        match registers.transmit_ring() {
            _ if outcome.full => Progress::Blocked,
            _ if outcome.more => Progress::More,
            _ if outcome.outside.is_some() => Progress::Nothing,
            Some(ring) if ring.head != ring.tail => Progress::More,
            _ => Progress::Nothing,
        }
    }

    fn receive(&self, path: &mut Path) -> Progress {
        let Path { dma, end: Some(end), waiting, frame, .. } = path else { return Progress::Nothing };
        let (settings, generation) = {
            let registers = self.registers.lock();
            let on = self.masters_the_bus() && registers.phy.link();
            (receive::Settings::of(&registers).filter(|_| on), registers.generation)
        };
        let Some(settings) = settings else {
            // Nobody listens: what comes is lost, as on a wire.
            *waiting = None;
            let lost = (0..BATCH).take_while(|_| end.receive(frame)).count();
            return if lost == BATCH { Progress::More } else { Progress::Nothing };
        };
        let ring = settings.ring;
        let mut traffic = Traffic::default();
        let (mut head, mut progress) = (ring.head, Progress::More);
        for _ in 0..BATCH {
            if let Some(kept) = waiting.take() {
                *frame = kept;
            } else if !end.receive(frame) {
                progress = Progress::Nothing;
                break;
            } else if let Err(why) = receive::wanted(&self.registers.lock(), frame) {
                traffic.too_long += u32::from(why == Unwanted::TooLong);
                continue;
            }
            let as_received = traffic;
            traffic.count(frame);
            match receive::deliver(dma, &settings, head, frame) {
                Delivered::At(next) => head = next,
                Delivered::Full => {
                    traffic = as_received;
                    *waiting = Some(std::mem::take(frame));
                    progress = Progress::Blocked;
                    break;
                }
                Delivered::Outside(at) => {
                    self.complain(|| format!("receive descriptor at {at:#x} is outside the guest's memory"));
                    progress = Progress::Blocked;
                    break;
                }
            }
        }
        let mut registers = self.registers.lock();
        if registers.generation != generation {
            return Progress::More;
        }
        registers.set(reg::RDH, head);
        traffic.received(&mut registers);
        if progress == Progress::Blocked {
            registers.count(stat::RNBC, 1);
        }
        registers.interrupts.raise(receive::causes(&settings, ring.available(ring.head), ring.available(head)));
        match registers.receive_ring() {
            // The driver has given more meanwhile.
            Some(now) if progress == Progress::Blocked && now.tail != ring.tail => Progress::More,
            _ => progress,
        }
    }
}

/// What came of a batch in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// There may be more at once.
    More,
    /// There is no more now.
    Nothing,
    /// There is more when the other side has made room.
    Blocked,
}
