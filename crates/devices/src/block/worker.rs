//! The thread that serves one queue.
//!
//! # Theory of operation
//!
//! It goes round: take requests from the ring as long as there are slots for them, begin what they ask for, give back those
//! that have ended, all with one look at each side. While the driver goes on asking it is not interrupted: it is told of what
//! has ended when a round found no request, or [`BATCH`] rounds later. When a round found nothing it looks again for a moment, because a driver
//! that has just been answered often asks at once; then it asks the driver for notifications and sleeps until the driver,
//! the disk or the owner wants something.
//!
//! The driver's eventfd is watched edge by edge and never read: reading could block, since O_NONBLOCK is a flag that the
//! front-end can take back.
//!
//! The owner's commands come through a channel. Those that touch the ring or the memory wait until nothing is in flight; no
//! request is taken meanwhile. So memory that the kernel or a thread of the pool uses is never replaced under it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use viaduct_memory::{Call, GuestMemory, Span};
use viaduct_ring::{Batch, Chain, DeviceQueue};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::buffer::{GuestBuffer, write};
use super::device::Shared;
use super::event::EventKind;
use super::operation::Operation;
use super::pool::Completions;
use super::request::{Disk, Kind, Parsed, Status, parse};
use super::uring::{Action, Uring};

/// Requests of one queue that are in flight at a time, at most.
const SLOTS: u32 = 128;
/// Requests taken in one go.
const BATCH: usize = 64;
/// Pieces of all requests in flight from which on no more are taken: a driver may make requests of very many.
const PIECES: usize = 1 << 16;
/// How long to look again before sleeping.
const LINGER: Duration = Duration::from_micros(20);
/// Milliseconds between looks at a queue whose driver does not notify.
const POLL: i32 = 1;

/// A started queue as the protocol describes it.
#[derive(Debug)]
pub struct BlockQueue {
    /// The ring.
    pub queue: DeviceQueue,
    /// Eventfd on which the driver notifies us; none: the queue has to be polled.
    pub kick: Option<OwnedFd>,
    /// What notifies the driver; none: it polls.
    pub call: Option<Call>,
}

/// What the owner wants.
#[derive(Debug)]
pub(super) enum Command {
    Enable(bool),
    SetCall(Option<Call>),
    SetMemory(GuestMemory),
    SetLogAddr(Option<u64>),
    /// Takes no more requests, and finishes those in flight.
    Drain,
    /// The same, and ends. Answered with the ring's position.
    Stop,
}

type Answer = Result<u32, String>;

/// The owner's handle of a thread.
#[derive(Debug)]
pub(super) struct Worker {
    commands: Sender<(Command, Sender<Answer>)>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub fn start(shared: Arc<Shared>, index: u16, start: BlockQueue) -> io::Result<Worker> {
        let (commands, received) = mpsc::channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let serving = Serving::new(shared, index, start, received, wake.clone())?;
        let thread = std::thread::Builder::new().name(format!("viaduct-blk{index}")).spawn(move || serving.run())?;
        Ok(Worker { commands, wake, thread: Some(thread) })
    }

    /// Has the thread obey, without waiting. The answer comes through the channel.
    pub fn ask(&self, command: Command) -> Receiver<Answer> {
        let (sender, answer) = mpsc::channel();
        // Nobody there any more: then the answer never comes, and its channel says so.
        let _ = self.commands.send((command, sender));
        let _ = self.wake.write(1);
        answer
    }
}

impl Worker {
    /// Waits for the end of a thread that was told to stop.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.thread.is_some() {
            drop(self.ask(Command::Stop));
            self.join();
        }
    }
}

/// A request in flight.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    kind: Kind,
    /// The byte for the status.
    status: Span,
    data: Vec<Span>,
    /// Number of pieces.
    pieces: usize,
    by_ring: bool,
}

struct Serving {
    // Dropped first: it waits for the kernel, which uses the queue's memory.
    uring: Option<Uring>,
    queue: DeviceQueue,
    kick: Option<OwnedFd>,
    call: Option<Call>,
    shared: Arc<Shared>,
    index: u16,
    completions: Arc<Completions>,
    commands: Receiver<(Command, Sender<Answer>)>,
    /// One that waits until nothing is in flight.
    waiting: Option<(Command, Sender<Answer>)>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Pieces of requests in flight.
    pieces: usize,
    /// Rounds for whose answers the driver has still to be interrupted.
    owed: usize,
    batch: Batch,
    done: Vec<(u32, io::Result<()>)>,
    enabled: bool,
    drained: bool,
    broken: bool,
    ended: bool,
}

impl Serving {
    fn new(
        shared: Arc<Shared>,
        index: u16,
        start: BlockQueue,
        commands: Receiver<(Command, Sender<Answer>)>,
        wake: Arc<EventFd>,
    ) -> io::Result<Serving> {
        let BlockQueue { mut queue, kick, call } = start;
        queue.disable_notifications();
        // Without io_uring the pool does everything.
        let uring = if shared.use_uring { Uring::new(&shared.image, SLOTS).ok().flatten() } else { None };
        let completions = Completions::new()?;
        let epoll = Epoll::new()?;
        let level = EventSet::IN;
        let mut watch = vec![(wake.as_raw_fd(), level), (completions.fd().as_raw_fd(), level)];
        watch.extend(uring.iter().map(|uring| (uring.fd().as_raw_fd(), level)));
        watch.extend(kick.iter().map(|kick| (kick.as_raw_fd(), level | EventSet::EDGE_TRIGGERED)));
        for (fd, events) in watch {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))?;
        }
        Ok(Serving {
            uring,
            queue,
            kick,
            call,
            shared,
            index,
            completions,
            commands,
            waiting: None,
            wake,
            epoll,
            slots: Vec::new(),
            free: Vec::new(),
            pieces: 0,
            owed: 0,
            batch: Batch::with_capacity(BATCH),
            done: Vec::new(),
            enabled: false,
            drained: false,
            broken: false,
            ended: false,
        })
    }

    fn run(mut self) {
        let mut last_work = Instant::now();
        loop {
            if self.round() {
                last_work = Instant::now();
            } else if self.ended {
                break;
            } else if self.takes() && last_work.elapsed() < LINGER {
                std::hint::spin_loop();
            } else {
                self.sleep();
            }
        }
    }

    /// Requests in flight.
    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether requests may be taken from the ring.
    fn takes(&self) -> bool {
        self.enabled && !self.drained && !self.broken && self.waiting.is_none()
    }

    /// Does what there is to do. Returns whether there was anything.
    fn round(&mut self) -> bool {
        self.obey();
        let taken = self.takes() && self.take();
        if let Some(uring) = &mut self.uring {
            uring.submit();
            uring.reap(&mut self.done);
        }
        self.completions.take(&mut self.done);
        let finished = !self.done.is_empty();
        let mut done = std::mem::take(&mut self.done);
        for (slot, result) in done.drain(..) {
            self.finish(slot, result);
        }
        self.done = done;
        if taken || finished {
            if self.queue.publish() || self.owed > 0 {
                self.owed += 1;
            }
            self.look_for_fault();
        }
        if self.owed > 0 && (!taken || self.owed >= BATCH) {
            self.call.as_ref().map(Call::signal);
            self.owed = 0;
        }
        taken || finished
    }

    /// Sleeps until there may be something to do.
    fn sleep(&mut self) {
        // A ring that is gone looks empty.
        self.look_for_fault();
        let room = self.room() > 0;
        let takes = self.takes();
        if takes && room && self.kick.is_some() && self.queue.enable_notifications() {
            self.queue.disable_notifications();
            return;
        }
        let timeout = if takes && room && self.kick.is_none() { POLL } else { -1 };
        let mut events = [EpollEvent::default(); 4];
        // A signal is as good a reason to look as any.
        let _ = self.epoll.wait(timeout, &mut events);
        if takes && room && self.kick.is_some() {
            self.queue.disable_notifications();
        }
    }

    /// How many more requests may be taken.
    fn room(&self) -> usize {
        if self.pieces >= PIECES { 0 } else { SLOTS as usize - self.in_flight() }
    }

    /// Takes requests and begins them. Returns whether there were any.
    fn take(&mut self) -> bool {
        let room = self.room().min(BATCH);
        if room == 0 {
            return false;
        }
        self.batch.clear();
        let mut batch = std::mem::take(&mut self.batch);
        if let Err(error) = self.queue.peek(&mut batch, room) {
            self.broken = true;
            self.shared.events.report(EventKind::Ring, self.index, || error.to_string());
        }
        self.queue.consume(&batch.chains);
        let disk = self.shared.disk();
        for chain in &batch.chains {
            self.begin(&disk, &batch, chain);
        }
        let taken = !batch.chains.is_empty();
        self.batch = batch;
        taken
    }

    fn begin(&mut self, disk: &Disk, batch: &Batch, chain: &Chain) {
        let number = self.free.pop().unwrap_or_else(|| {
            let span = Span::new(std::ptr::NonNull::dangling(), 0);
            let (chain, kind) = (Chain::default(), Kind::Flush);
            self.slots.push(Slot { chain, kind, status: span, data: Vec::new(), pieces: 0, by_ring: false });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[number as usize];
        // SAFETY: the queue keeps its memory, from which the batch was taken just now.
        let parsed = unsafe { parse(disk, batch, chain, &mut slot.data) };
        let problem = match parsed {
            Parsed::Run(kind, status) => {
                (slot.chain, slot.kind, slot.status, slot.pieces) = (*chain, kind, status, slot.data.len());
                self.pieces += slot.pieces;
                self.run_slot(number);
                return;
            }
            Parsed::Answer(code, status, problem) => {
                self.answer(chain, status, code);
                problem
            }
            Parsed::Unanswerable(problem) => {
                self.queue.complete(chain, 0);
                problem
            }
        };
        self.free.push(number);
        self.shared.counters.refused.fetch_add(1, Ordering::Relaxed);
        self.shared.events.report(EventKind::Request, self.index, || problem);
    }

    /// Has the disk do what a slot asks for.
    fn run_slot(&mut self, number: u32) {
        let slot = &mut self.slots[number as usize];
        let durable = self.shared.is_write_through();
        let (action, offset) = match slot.kind {
            Kind::In(offset) => (Some(Action::Read), offset),
            Kind::Out(offset) => (Some(Action::Write(durable)), offset),
            Kind::Flush => (Some(Action::Flush), 0),
            _ => (None, 0),
        };
        slot.by_ring = false;
        if let (Some(action), Some(uring)) = (action, &mut self.uring) {
            slot.by_ring = true;
            // SAFETY: the queue keeps its memory, and is replaced or dropped only after everything in flight has ended.
            unsafe { uring.start(number, action, offset, &mut slot.data) };
            return;
        }
        let memory = self.queue.memory().clone();
        // SAFETY: the pieces were translated by this memory.
        let buffer = |spans: &[Span]| unsafe { GuestBuffer::new(spans.to_vec(), memory) };
        let operation = match &slot.kind {
            Kind::In(offset) => Operation::Read { offset: *offset, data: buffer(&slot.data) },
            Kind::Out(offset) => Operation::Write { offset: *offset, data: buffer(&slot.data) },
            Kind::Flush => Operation::Flush,
            Kind::Discard(ranges) => Operation::Discard(ranges.clone()),
            Kind::WriteZeroes(ranges) => Operation::WriteZeroes(ranges.clone()),
            Kind::GetId => {
                // SAFETY: the queue keeps its memory.
                unsafe { write(&slot.data, 0, &self.shared.serial) };
                self.done.push((number, Ok(())));
                return;
            }
        };
        self.shared.pool.submit(operation, durable, number, &self.completions);
    }

    /// Gives a request back that has ended.
    fn finish(&mut self, number: u32, result: io::Result<()>) {
        let slot = &mut self.slots[number as usize];
        if slot.by_ring
            && let Some(uring) = &mut self.uring
        {
            uring.take_spans(number, &mut slot.data);
        }
        self.pieces -= slot.pieces;
        self.shared.counters.count(&slot.kind, &slot.data, result.is_ok());
        if let Err(error) = &result {
            let what = describe(&slot.kind, &slot.data);
            self.shared.events.report(EventKind::Disk, self.index, || {
                format!("{what} failed: {error}{}; the guest was told (VIRTIO_BLK_S_IOERR)", advice(error))
            });
        }
        if self.queue.memory().log().is_some() && matches!(slot.kind, Kind::In(_) | Kind::GetId) {
            for span in &slot.data {
                self.queue.memory().mark_written(*span, span.len());
            }
        }
        let (chain, status) = (slot.chain, slot.status);
        self.free.push(number);
        self.answer(&chain, status, if result.is_ok() { Status::Ok } else { Status::IoErr });
    }

    /// Writes the status and stages the chain. Its length counts all that the driver gave to write into, as with QEMU: what a
    /// failed read left there is for the driver to ignore.
    fn answer(&mut self, chain: &Chain, status: Span, code: Status) {
        // SAFETY: the queue keeps the memory of its chains.
        unsafe { status.write(0, &[code as u8]) };
        self.queue.memory().mark_written(status, 1);
        self.queue.complete(chain, chain.writable_len);
    }

    fn look_for_fault(&mut self) {
        if !self.broken && self.queue.faulted() {
            self.broken = true;
            let message = || "the file behind the guest's memory was cut under it".to_owned();
            self.shared.events.report(EventKind::Memory, self.index, message);
        }
    }

    /// Does what the owner wants, as far as it is time for it.
    fn obey(&mut self) {
        loop {
            let Some((command, answer)) = self.waiting.take().or_else(|| self.next_command()) else { return };
            let calm = matches!(command, Command::SetCall(_) | Command::Enable(true));
            if !calm && self.in_flight() > 0 {
                self.waiting = Some((command, answer));
                return;
            }
            // Nobody may wait for the answer any more.
            let _ = answer.send(self.carry_out(command));
        }
    }

    fn next_command(&mut self) -> Option<(Command, Sender<Answer>)> {
        let command = self.commands.try_recv().ok()?;
        // One count for each command, but one read takes them all: those that come later write again.
        let _ = self.wake.read();
        Some(command)
    }

    fn carry_out(&mut self, command: Command) -> Answer {
        match command {
            Command::Enable(enabled) => self.enabled = enabled,
            Command::SetCall(call) => self.call = call,
            Command::SetLogAddr(addr) => self.queue.set_log_addr(addr),
            Command::SetMemory(memory) => self.queue.set_memory(memory).map_err(|error| error.to_string())?,
            Command::Drain => {
                self.drained = true;
                self.shared.events.report(EventKind::Drained, self.index, String::new);
            }
            Command::Stop => {
                self.ended = true;
                return Ok(self.queue.leave());
            }
        }
        Ok(0)
    }
}

fn describe(kind: &Kind, data: &[Span]) -> String {
    let len: u64 = data.iter().map(|span| u64::from(span.len())).sum();
    match kind {
        Kind::In(offset) => format!("a read of {len} bytes at byte {offset}"),
        Kind::Out(offset) => format!("a write of {len} bytes at byte {offset}"),
        Kind::Flush => "a flush".to_owned(),
        Kind::GetId => "asking for the serial number".to_owned(),
        Kind::Discard(ranges) => format!("discarding {} ranges", ranges.len()),
        Kind::WriteZeroes(ranges) => format!("zeroing {} ranges", ranges.len()),
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => " (make room on the host's file system)",
        Some(libc::EIO) => " (the host's disk: see its kernel log)",
        Some(libc::EFAULT) => " (the guest's memory is not there)",
        _ => "",
    }
}
