//! The thread that runs a source or a sink over a driver.

use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use viaduct_ring::RingError;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::monotonic;
use crate::driver::NetDriver;
use crate::link::LinkCounters;
use crate::sleep;

/// What a job wants after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To be called again at once.
    Again,
    /// To be called at this time of the monotonic clock.
    Wait(u64),
    /// To be called when frames were received, or at this time.
    WaitForFrames(u64),
    /// To be called when the device has taken a frame.
    WaitForRoom,
    /// Not to be called any more.
    Done,
}

/// Something to do with a driver.
pub trait Job: Send + 'static {
    /// What it comes to.
    type Report: Clone + Default + Send;

    /// A driver is there, the first one or another one after the link was lost.
    fn attached(&mut self, driver: &mut NetDriver);

    /// Does a batch.
    ///
    /// # Errors
    /// What the device did wrong.
    fn step(&mut self, driver: &mut NetDriver) -> Result<Step, RingError>;

    /// How it stands.
    fn report(&self) -> Self::Report;
}

/// What an engine says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineEvent {
    /// The job is done.
    Done,
    /// The link cannot be used any more and was taken out.
    LinkBroken(String),
}

enum Command {
    Attach(Box<NetDriver>),
    Detach(Sender<()>),
    Stop,
}

struct Shared<R> {
    report: Mutex<R>,
    events: Mutex<Vec<EngineEvent>>,
    ready: EventFd,
    wake: EventFd,
    commanded: AtomicBool,
    counters: Arc<LinkCounters>,
}

/// A job on a thread of its own; dropping it ends both.
pub struct Engine<J: Job> {
    shared: Arc<Shared<J::Report>>,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

/// Between two reports that can be seen from outside.
const REPORT_EVERY: u64 = 50_000_000;
/// Steps between two looks at the clock for that.
const STEPS: u32 = 256;

impl<J: Job> Engine<J> {
    /// Starts the thread; the job begins when there is a driver.
    ///
    /// # Errors
    /// When there is no eventfd or thread.
    pub fn new(job: J, counters: Arc<LinkCounters>) -> std::io::Result<Engine<J>> {
        let shared = Arc::new(Shared {
            report: Mutex::default(),
            events: Mutex::default(),
            ready: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            commanded: AtomicBool::new(false),
            counters,
        });
        let (commands, inbox) = channel();
        let runner = Runner { job, driver: None, inbox, shared: shared.clone(), done: false, reported: 0 };
        let thread = std::thread::Builder::new().name("viaduct-traffic".into()).spawn(move || runner.run())?;
        Ok(Engine { shared, commands, thread: Some(thread) })
    }

    fn send(&self, command: Command) {
        // A thread that has ended has let go of everything.
        if self.commands.send(command).is_ok() {
            self.shared.commanded.store(true, Ordering::Release);
            let _ = self.shared.wake.write(1);
        }
    }

    /// Gives the job a driver.
    pub fn attach(&self, driver: NetDriver) {
        self.send(Command::Attach(Box::new(driver)));
    }

    /// Takes the driver away. When this returns it is no longer used.
    pub fn detach(&self) {
        let (done, wait) = channel();
        self.send(Command::Detach(done));
        // An error means that the thread has ended, and the driver with it.
        let _ = wait.recv();
    }

    /// How the job stands, as of a moment ago.
    pub fn report(&self) -> J::Report {
        self.shared.report.lock().clone()
    }

    /// Readable while there are events.
    pub fn event_fd(&self) -> RawFd {
        self.shared.ready.as_raw_fd()
    }

    /// The events since the last call.
    pub fn take_events(&self) -> Vec<EngineEvent> {
        // An error means that it was not readable.
        let _ = self.shared.ready.read();
        std::mem::take(&mut *self.shared.events.lock())
    }

    /// Counts of all drivers so far.
    pub fn counters(&self) -> &Arc<LinkCounters> {
        &self.shared.counters
    }
}

impl<J: Job> Drop for Engine<J> {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // The thread catches its own panics.
            let _ = thread.join();
        }
    }
}

struct Runner<J: Job> {
    job: J,
    driver: Option<Box<NetDriver>>,
    inbox: Receiver<Command>,
    shared: Arc<Shared<J::Report>>,
    done: bool,
    reported: u64,
}

impl<J: Job> Runner<J> {
    fn run(mut self) {
        // Sleeps of microseconds shall not be rounded up by fifty of them (prctl(2), PR_SET_TIMERSLACK).
        // SAFETY: sets a number of this thread.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
        if catch_unwind(AssertUnwindSafe(|| self.serve())).is_err() {
            self.tell(EngineEvent::LinkBroken("the thread failed; its message on standard error says where".into()));
        }
    }

    fn serve(&mut self) {
        loop {
            if self.shared.commanded.swap(false, Ordering::Acquire) && !self.obey() {
                return;
            }
            let step = match &mut self.driver {
                Some(driver) if !self.done => self.work(),
                _ => Step::Wait(u64::MAX),
            };
            match step {
                Step::Again => {}
                Step::Done => {
                    self.done = true;
                    self.publish(monotonic());
                    self.tell(EngineEvent::Done);
                }
                Step::Wait(_) | Step::WaitForFrames(_) | Step::WaitForRoom => self.sleep(step),
            }
        }
    }

    /// Several steps, as long as there is something to do.
    fn work(&mut self) -> Step {
        let Some(driver) = &mut self.driver else { return Step::Wait(u64::MAX) };
        let mut result = Ok(Step::Again);
        for _ in 0..STEPS {
            result = self.job.step(driver);
            if result != Ok(Step::Again) {
                break;
            }
        }
        let now = monotonic();
        if now - self.reported > REPORT_EVERY {
            self.publish(now);
        }
        let broken = match &result {
            Err(error) => Some(error.to_string()),
            Ok(_) if self.driver.as_ref().is_some_and(|driver| driver.faulted()) => {
                Some("the memory shared with the back-end was cut short".to_owned())
            }
            Ok(_) => None,
        };
        if let Some(why) = broken {
            self.driver = None;
            self.tell(EngineEvent::LinkBroken(why));
        }
        result.unwrap_or(Step::Wait(u64::MAX))
    }

    fn publish(&mut self, now: u64) {
        self.reported = now;
        *self.shared.report.lock() = self.job.report();
    }

    fn tell(&self, event: EngineEvent) {
        self.shared.events.lock().push(event);
        // It fails only when it is readable anyway.
        let _ = self.shared.ready.write(1);
    }

    /// Obeys what was asked for; `false`: to stop.
    fn obey(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Attach(driver)) => self.job.attached(self.driver.insert(driver)),
                Ok(Command::Detach(done)) => {
                    self.driver = None;
                    self.publish(monotonic());
                    // Whoever asked may have stopped waiting.
                    let _ = done.send(());
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn sleep(&mut self, step: Step) {
        self.publish(monotonic());
        let mut fds = vec![self.shared.wake.as_raw_fd()];
        if let Some(driver) = &mut self.driver {
            let mut work = false;
            for pair in &mut driver.pairs {
                work |= match step {
                    Step::WaitForFrames(_) => pair.receive.arm(),
                    Step::WaitForRoom => pair.transmit.free() == 0 && pair.transmit.arm(),
                    _ => false,
                };
            }
            if work {
                disarm(driver);
                return;
            }
            fds.extend(driver.call_fds());
        }
        LinkCounters::add(&self.shared.counters.sleeps, 1);
        let timeout = match step {
            Step::Wait(until) | Step::WaitForFrames(until) if until < u64::MAX => {
                Some(Duration::from_nanos(until.saturating_sub(monotonic())))
            }
            _ => None,
        };
        sleep::until_readable(&fds, timeout);
        // An error means that it was not readable.
        let _ = self.shared.wake.read();
        if let Some(driver) = &mut self.driver {
            disarm(driver);
        }
    }
}

fn disarm(driver: &mut NetDriver) {
    for pair in &mut driver.pairs {
        pair.receive.disarm();
        pair.transmit.disarm();
    }
}
