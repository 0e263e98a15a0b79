//! A poller: one thread that carries the frames of the inputs assigned to it.
//!
//! # Theory of operation
//!
//! An input is *active* or *armed*. Active inputs are polled in turn, and their drivers are asked not to notify. One that
//! has had nothing for the length of a *spin* is armed: its driver is asked to notify, and the poller forgets it until
//! epoll reports it. With no active inputs the poller sleeps in epoll and costs nothing; with some, it looks into epoll
//! now and then. So an idle port costs a busy switch nothing, and an idle switch costs nothing at all.
//!
//! How long to spin is learned from what happens ([`Spin`]): sleeping and waking cost a few microseconds, which is wasted
//! when the next frame was about to come, and saved when it was not.
//!
//! The poller holds the fabric's read guard while it works and offers it to a waiting writer between two rounds.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use viaduct_memory::fault;

use crate::clock;
use crate::event::{Event, Events};
use crate::fabric::{Fabric, SourceId};
use crate::forward::{Forwarder, Progress};
use crate::poller_counters::PollerCounters;
use crate::port::{Input, Output};
use crate::turns::{Account, Turns};

/// How pollers wait for frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Polling {
    /// Spin while frames flow, sleep when they stop.
    #[default]
    Adaptive,
    /// Never sleep while there is a queue.
    Busy,
    /// Never spin.
    Interrupt,
}

/// Looks into epoll are at least this far apart while frames flow.
const GLANCE: Duration = Duration::from_micros(40);
/// Rounds between two looks at an input that has been silent while pollers are busy.
const REST: u32 = 15;
/// Inputs reported by one look.
const REPORTS: usize = 64;
/// The token of the eventfd by which control wakes a poller.
const WAKE: u64 = u64::MAX;

/// What control shares with one poller.
#[derive(Debug)]
pub(crate) struct PollerLink {
    epoll: OwnedFd,
    wake: OwnedFd,
    /// Inputs that have something although their drivers did not say so.
    revived: Mutex<Vec<SourceId>>,
    pub counters: PollerCounters,
}

impl PollerLink {
    pub fn new() -> std::io::Result<PollerLink> {
        // SAFETY: both calls create descriptors that are taken over at once.
        let (epoll, wake) = unsafe {
            (
                owned(libc::epoll_create1(libc::EPOLL_CLOEXEC))?,
                owned(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK))?,
            )
        };
        let link = PollerLink { epoll, wake, revived: Mutex::default(), counters: PollerCounters::default() };
        link.watch(&link.wake, WAKE)?;
        Ok(link)
    }

    /// Reports `fd` under `token` whenever it becomes readable anew.
    pub fn watch(&self, fd: &impl AsRawFd, token: u64) -> std::io::Result<()> {
        let mut event = libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET) as u32, u64: token };
        // SAFETY: two descriptors that are open and a valid local.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &mut event) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// Ends [`watch`](PollerLink::watch).
    pub fn unwatch(&self, fd: BorrowedFd) {
        // SAFETY: two open descriptors; it fails without effect if the second was not watched.
        unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd.as_raw_fd(), std::ptr::null_mut()) };
    }

    /// Lets the poller look at an input again.
    pub fn revive(&self, source: SourceId) {
        self.revived.lock().push(source);
        self.wake();
    }

    /// Wakes the poller if it sleeps.
    pub fn wake(&self) {
        // SAFETY: writes a local to a descriptor that we own.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const ONE).cast(), 8) };
    }

    fn wait(&self, reports: &mut [libc::epoll_event; REPORTS], timeout: i32) -> usize {
        // SAFETY: the array has room for as many events as said.
        let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), reports.as_mut_ptr(), REPORTS as i32, timeout) };
        // Interrupted: nothing to report.
        usize::try_from(count).unwrap_or(0)
    }
}

static ONE: u64 = 1;

/// # Safety
/// `fd` is a fresh descriptor or negative after a failure.
unsafe fn owned(fd: i32) -> std::io::Result<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: fresh, says the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How long it pays to wait for the next frame before sleeping.
#[derive(Debug)]
struct Spin {
    polling: Polling,
    now: u64,
    least: u64,
    most: u64,
    /// A sleep shorter than this cost more than waiting would have.
    worth: u64,
}

impl Spin {
    fn new(polling: Polling) -> Spin {
        let ticks = |nanoseconds| clock::in_ticks(Duration::from_nanos(nanoseconds));
        Spin { polling, now: ticks(50_000), least: ticks(1000), most: ticks(50_000), worth: ticks(25_000) }
    }

    /// Whether an input that has been idle for `idle` ticks is to be armed.
    fn is_over(&self, idle: u64) -> bool {
        match self.polling {
            Polling::Adaptive => idle > self.now,
            Polling::Busy => false,
            Polling::Interrupt => true,
        }
    }

    /// For how many rounds an input that has been idle for `idle` ticks is left alone, where inputs are never armed: a look at
    /// a silent ring costs as much as a packet.
    fn rest(&self, idle: u64) -> u32 {
        if self.polling == Polling::Busy && idle > self.most { REST } else { 0 }
    }

    /// Learns from a sleep of `slept` ticks that a frame ended: it was either worth waiting for or not.
    fn learn(&mut self, slept: u64) {
        self.now = if slept < self.worth { (self.now * 2).min(self.most) } else { (self.now / 2).max(self.least) };
    }
}

#[derive(Debug)]
struct Active {
    source: SourceId,
    /// When it last had a frame, in ticks.
    last_frame: u64,
    /// Rounds in which it is not looked at.
    rest: u32,
    account: Account,
}

impl Active {
    fn new(source: SourceId, now: u64) -> Active {
        Active { source, last_frame: now, rest: 0, account: Account::default() }
    }
}

/// The thread's state.
pub(crate) struct Poller {
    pub index: usize,
    pub fabric: Arc<RwLock<Fabric>>,
    pub link: Arc<PollerLink>,
    pub events: Arc<Events>,
    pub stop: Arc<AtomicBool>,
    pub polling: Polling,
}

impl Poller {
    /// Runs until `stop` is set.
    pub fn run(self) {
        let mut forwarder = Forwarder::new();
        let mut spin = Spin::new(self.polling);
        let glance = clock::in_ticks(GLANCE);
        let counters = &self.link.counters;
        let mut active: Vec<Active> = Vec::new();
        let mut turns = Turns::new();
        let mut generation = 0;
        let mut faults = 0;
        let mut reports = [libc::epoll_event { events: 0, u64: 0 }; REPORTS];
        let mut guard = self.fabric.read();
        let mut before = clock::ticks();
        let mut glanced = before;
        while !self.stop.load(Relaxed) {
            RwLockReadGuard::bump(&mut guard);
            if guard.generation != generation {
                generation = guard.generation;
                let sources = if guard.held { &[][..] } else { &guard.sources[self.index] };
                active.clear();
                active.extend(sources.iter().map(|&source| Active::new(source, before)));
                for each in &active {
                    with_input(&guard, each.source, Input::disarm);
                }
            }
            let mut moved = false;
            turns.begin();
            active.retain_mut(|each| {
                if each.rest > 0 {
                    each.rest -= 1;
                    return true;
                }
                if !turns.may_go(&mut each.account, before) {
                    return true;
                }
                match forwarder.forward(&guard, each.source) {
                    Progress::Moved(count) => {
                        counters.batch(count);
                        each.last_frame = before;
                        moved = true;
                        let (cost, more) = forwarder.take_cost();
                        turns.charge(&mut each.account, cost, more);
                        true
                    }
                    Progress::Waiting => {
                        let (cost, more) = forwarder.take_cost();
                        turns.charge(&mut each.account, cost, more);
                        true
                    }
                    Progress::Throttled(ticks) => {
                        each.last_frame = before;
                        turns.hold(&mut each.account, before.saturating_add(ticks));
                        true
                    }
                    Progress::Idle => {
                        let idle = before.wrapping_sub(each.last_frame);
                        each.rest = spin.rest(idle);
                        !spin.is_over(idle) || with_input(&guard, each.source, Input::arm).unwrap_or(false)
                    }
                    Progress::Broken(message) => {
                        self.events.push(Event { port: each.source.port, queue: 2 * each.source.queue + 1, message });
                        false
                    }
                }
            });
            for (port, queue, message) in forwarder.broken.drain(..) {
                self.events.push(Event { port, queue: 2 * queue, message });
            }
            if fault::count() != faults {
                faults = fault::count();
                self.break_faulted(&guard);
            }
            let mut now = clock::ticks();
            counters.rounds.add(1);
            (if moved { &counters.busy_ticks } else { &counters.idle_ticks }).add(now.wrapping_sub(before));
            let timeout = if active.is_empty() { Some(-1) } else { self.pause(&turns, now) };
            if let Some(timeout) = timeout {
                counters.active.store(active.len() as u64, Relaxed);
                counters.sleeps.add(1);
                drop(guard);
                let count = self.link.wait(&mut reports, timeout);
                guard = self.fabric.read();
                let slept = clock::ticks().wrapping_sub(now);
                now = now.wrapping_add(slept);
                if self.wake_sources(&guard, &reports[..count], &mut active, now) {
                    counters.wakeups.add(1);
                    spin.learn(slept);
                }
                glanced = now;
            } else if now.wrapping_sub(glanced) > glance {
                counters.active.store(active.len() as u64, Relaxed);
                let count = self.link.wait(&mut reports, 0);
                self.wake_sources(&guard, &reports[..count], &mut active, now);
                glanced = now;
            }
            before = now;
        }
    }

    /// How many milliseconds to sleep, if all active inputs are at their rate limits and that is worth it.
    #[inline(always)]
    fn pause(&self, turns: &Turns, now: u64) -> Option<i32> {
        let wait = turns.pause()?.saturating_sub(now);
        let millisecond = clock::ticks_per_second() / 1000;
        let worth_it = self.polling != Polling::Busy && wait > millisecond / 2;
        worth_it.then(|| i32::try_from(wait.div_ceil(millisecond)).unwrap_or(i32::MAX))
    }

    /// Activates the inputs that epoll reports. Returns whether there were any.
    fn wake_sources(&self, fabric: &Fabric, reports: &[libc::epoll_event], active: &mut Vec<Active>, now: u64) -> bool {
        let mut woken = false;
        let revived = match reports.iter().any(|report| { report.u64 } == WAKE) {
            true => std::mem::take(&mut *self.link.revived.lock()),
            false => Vec::new(),
        };
        let reported = reports.iter().map(|report| report.u64).filter(|&token| token != WAKE);
        for source in reported.map(SourceId::from_token).chain(revived) {
            // A report may be older than the queue's end, and a polled queue may be reported.
            let mine = !fabric.held && fabric.sources[self.index].contains(&source);
            if mine && active.iter().all(|each| each.source != source) {
                with_input(fabric, source, Input::disarm);
                if let Some(slot) = fabric.port(source.port).and_then(|port| port.inputs.get(usize::from(source.queue)))
                {
                    slot.kicks.add(1);
                }
                active.push(Active::new(source, now));
                woken = true;
            }
        }
        woken
    }

    /// Cuts off the ports whose memory is gone: somewhere an access has faulted.
    #[cold]
    fn break_faulted(&self, fabric: &Fabric) {
        let message = "the file behind the guest's memory, or its log, became shorter than the front-end said when it shared it \
                       (vhost-user, Memory region description)";
        for port in fabric.all() {
            for (queue, slot) in port.inputs.iter().enumerate() {
                let state = &mut *slot.state.lock();
                if let Input::Vhost(input) = &state.input
                    && input.faulted()
                    && !std::mem::replace(&mut state.broken, true)
                {
                    let queue = 2 * queue as u16 + 1;
                    self.events.push(Event { port: port.number, queue, message: message.to_owned() });
                }
            }
            for (queue, slot) in port.outputs.iter().enumerate() {
                if let Output::Vhost(output) = &mut slot.state.lock().output
                    && output.faulted()
                {
                    output.break_with(message);
                    if let Some(message) = output.take_error() {
                        self.events.push(Event { port: port.number, queue: 2 * queue as u16, message });
                    }
                }
            }
        }
    }
}

/// None if the input is not there, or broken: then its ring is not to be touched, and nothing will ever be taken from it.
fn with_input<R>(fabric: &Fabric, source: SourceId, act: impl FnOnce(&mut Input) -> R) -> Option<R> {
    let slot = fabric.port(source.port)?.inputs.get(usize::from(source.queue))?;
    let state = &mut *slot.state.lock();
    (!state.broken).then(|| act(&mut state.input))
}
