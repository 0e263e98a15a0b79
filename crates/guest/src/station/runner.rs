//! The thread of a station.
//!
//! It sleeps in `ppoll` on the link's call eventfds and its own wake eventfd, until the next timer of the stack or of a
//! task. It never spins: while frames flow it finds more of them each time it looks, with the device's notifications off;
//! when it finds none, it turns them on, looks once more and sleeps.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use super::task::{Step, Task};
use super::{Event, Outcome, Shared, TaskSpec, Ticket};
use crate::link::{Link, LinkCounters};
use crate::sleep;
use crate::stack::Stack;

/// What a station's holder asks of the thread.
pub(super) enum Command {
    Start(Ticket, TaskSpec),
    Cancel(Ticket),
    Attach(Box<dyn Link>),
    Detach(Sender<()>),
    Announce,
    Stop,
}

pub(super) struct Runner {
    stack: Stack,
    tasks: BTreeMap<Ticket, Box<dyn Task>>,
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
}

impl Runner {
    pub(super) fn new(stack: Stack, inbox: Receiver<Command>, shared: Arc<Shared>) -> Runner {
        Runner { stack, tasks: BTreeMap::new(), inbox, shared }
    }

    pub(super) fn run(mut self) {
        let result = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let why = match result {
            Ok(()) => "the guest was stopped",
            Err(_) => "the guest's thread failed; its message on standard error says where",
        };
        self.shared.link_up.store(false, Ordering::Relaxed);
        let queued = self.inbox.try_iter().filter_map(|command| match command {
            Command::Start(ticket, _) => Some(ticket),
            _ => None,
        });
        for ticket in self.tasks.into_keys().chain(queued) {
            self.shared.report(Event::Finished(ticket, Outcome::Failed(why.into())));
        }
    }

    fn serve(&mut self) {
        while let Some(commanded) = self.obey() {
            let more_frames = self.stack.poll();
            let (busy, deadline) = self.step_tasks();
            self.check_link();
            if !(commanded || more_frames || busy) {
                self.sleep(deadline);
            }
        }
    }

    /// Obeys what was asked for; returns whether there was anything. `None`: to stop.
    fn obey(&mut self) -> Option<bool> {
        let mut any = false;
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Start(ticket, spec)) => match spec.into_task(&mut self.stack, &self.shared.services) {
                    Ok(task) => drop(self.tasks.insert(ticket, task)),
                    Err(why) => self.shared.report(Event::Finished(ticket, Outcome::Failed(why))),
                },
                Ok(Command::Cancel(ticket)) => self.end_task(ticket),
                Ok(Command::Attach(link)) => {
                    self.stack.attach(link);
                    self.shared.link_up.store(true, Ordering::Relaxed);
                }
                Ok(Command::Detach(done)) => {
                    self.unplug();
                    // Whoever asked may have stopped waiting.
                    let _ = done.send(());
                }
                Ok(Command::Announce) => self.stack.announce(),
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => return Some(any),
            }
            any = true;
        }
    }

    fn end_task(&mut self, ticket: Ticket) {
        if let Some(task) = self.tasks.remove(&ticket) {
            let outcome = task.end(&mut self.stack);
            self.shared.report(Event::Finished(ticket, outcome));
        }
    }

    fn unplug(&mut self) {
        self.stack.detach();
        self.shared.link_up.store(false, Ordering::Relaxed);
    }

    /// Lets every task do what it can. Returns whether one wants to go on at once, and when the first one wants to be
    /// called again.
    fn step_tasks(&mut self) -> (bool, Option<Instant>) {
        let (mut again, mut deadline) = (false, None::<Instant>);
        let mut ended = Vec::new();
        for (&ticket, task) in &mut self.tasks {
            match task.step(&mut self.stack, Instant::now()) {
                Step::Again => again = true,
                Step::Wait(until) => deadline = earlier(deadline, until),
                Step::Done => ended.push(ticket),
            }
        }
        again |= !ended.is_empty();
        ended.into_iter().for_each(|ticket| self.end_task(ticket));
        (again, deadline)
    }

    fn check_link(&mut self) {
        if let Some(why) = self.stack.link().and_then(|link| link.broken()) {
            self.unplug();
            self.shared.report(Event::LinkBroken(why));
        }
    }

    fn sleep(&mut self, deadline: Option<Instant>) {
        let mut fds = vec![self.shared.wake.as_raw_fd()];
        let mut deadline = deadline;
        let timer = self.stack.poll_delay();
        // Without a link the stack's timers mean nothing: nobody could hear what they would make it say.
        if let Some(link) = self.stack.link() {
            let until_room = timer == Some(Duration::ZERO) && !link.can_transmit();
            match timer {
                Some(Duration::ZERO) if !until_room => return,
                Some(timer) if !until_room => deadline = earlier(deadline, Some(Instant::now() + timer)),
                _ => {}
            }
            if !link.prepare_to_sleep(until_room) {
                link.awake();
                return;
            }
            fds.extend(link.wake_fds());
        }
        LinkCounters::add(&self.shared.counters.sleeps, 1);
        sleep::until_readable(&fds, deadline.map(|d| d.saturating_duration_since(Instant::now())));
        // An error means that it was not readable.
        let _ = self.shared.wake.read();
        if let Some(link) = self.stack.link() {
            link.awake();
        }
    }
}

pub(super) fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
