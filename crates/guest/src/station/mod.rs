//! One guest on one thread.
//!
//! # Theory of operation
//!
//! A station owns a [`Stack`] and runs *tasks* over it: a ping, a stream, a set of services. Whoever holds the
//! [`Station`] starts a task and gets a ticket; when the task ends, an [`Event`] with that ticket is queued and an eventfd
//! becomes readable. So nobody ever waits for the thread, and an event loop can wait for any number of stations.
//!
//! A link that breaks is reported and taken out. Tasks go on without it until another one is attached.

mod datagrams;
mod ping;
mod runner;
mod services;
mod stream;
mod task;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use datagrams::{DatagramConfig, DatagramReport};
pub use ping::{PingConfig, PingReport};
pub use services::{Ports, ServiceCounters};
pub use stream::{Direction, Limit, StreamConfig, StreamReport};
pub use task::{Outcome, TaskSpec};

use crate::link::{Link, LinkCounters};
use crate::stack::{Stack, StackConfig, StackError};
use runner::{Command, Runner};

/// Names a task of a station.
pub type Ticket = u64;

/// What a station reports.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A task ended.
    Finished(Ticket, Outcome),
    /// The link cannot be used any more and was taken out.
    LinkBroken(String),
}

/// Why a station cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StationError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] StackError),
    /// No eventfd or no thread.
    #[error("no {what} for the guest: {source}; raise the limit on open files or threads (ulimit -n, ulimit -u)")]
    System {
        /// What is missing.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// What the thread and the holder of the station both see.
struct Shared {
    events: Mutex<Vec<Event>>,
    /// Readable while there are events.
    ready: EventFd,
    /// Wakes the thread.
    wake: EventFd,
    link_up: AtomicBool,
    counters: Arc<LinkCounters>,
    services: Arc<ServiceCounters>,
}

impl Shared {
    fn report(&self, event: Event) {
        self.events.lock().push(event);
        // It fails only when it is readable anyway.
        let _ = self.ready.write(1);
    }
}

/// A guest; dropping it stops its thread.
pub struct Station {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    next_ticket: Ticket,
    thread: Option<JoinHandle<()>>,
}

impl Station {
    /// Starts a guest that has no link yet. Its links count into `counters`.
    ///
    /// # Errors
    /// [`StationError`].
    pub fn new(config: StackConfig, counters: Arc<LinkCounters>) -> Result<Station, StationError> {
        let system = |what| move |source| StationError::System { what, source };
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(system("eventfd"));
        let shared = Arc::new(Shared {
            events: Mutex::default(),
            ready: eventfd()?,
            wake: eventfd()?,
            link_up: AtomicBool::new(false),
            counters,
            services: Arc::default(),
        });
        let stack = Stack::new(config)?;
        let (commands, inbox) = channel();
        let runner = Runner::new(stack, inbox, shared.clone());
        let thread = std::thread::Builder::new()
            .name("viaduct-guest".into())
            .spawn(move || runner.run())
            .map_err(system("thread"))?;
        Ok(Station { shared, commands, next_ticket: 1, thread: Some(thread) })
    }

    fn send(&self, command: Command) {
        // A thread that has ended has reported all its tasks as ended.
        if self.commands.send(command).is_ok() {
            let _ = self.shared.wake.write(1);
        }
    }

    /// Starts a task. Its end comes as [`Event::Finished`] with the ticket returned.
    pub fn start(&mut self, task: TaskSpec) -> Ticket {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.send(Command::Start(ticket, task));
        ticket
    }

    /// Ends a task early: it reports what it has.
    pub fn cancel(&self, ticket: Ticket) {
        self.send(Command::Cancel(ticket));
    }

    /// Plugs a link in, in place of the one that may be there.
    pub fn attach(&self, link: Box<dyn Link>) {
        self.send(Command::Attach(link));
    }

    /// Takes the link out. When this returns, the thread no longer touches its memory and file descriptors. Waits for the
    /// thread for the time of one batch.
    pub fn detach(&self) {
        let (done, wait) = channel();
        self.send(Command::Detach(done));
        // An error means that the thread has ended, and the link with it.
        let _ = wait.recv();
    }

    /// Tells the network again where this guest is.
    pub fn announce(&self) {
        self.send(Command::Announce);
    }

    /// Whether there is a link.
    pub fn link_up(&self) -> bool {
        self.shared.link_up.load(Ordering::Relaxed)
    }

    /// Readable while [`take_events`](Station::take_events) has something.
    pub fn event_fd(&self) -> RawFd {
        self.shared.ready.as_raw_fd()
    }

    /// The events since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        // An error means that it was not readable.
        let _ = self.shared.ready.read();
        std::mem::take(&mut *self.shared.events.lock())
    }

    /// Counts of all links so far.
    pub fn counters(&self) -> &Arc<LinkCounters> {
        &self.shared.counters
    }

    /// Counts of all services so far.
    pub fn services(&self) -> &ServiceCounters {
        &self.shared.services
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // The thread catches its own panics.
            let _ = thread.join();
        }
    }
}
