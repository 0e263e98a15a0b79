//! Threads that wait for a disk, so that a queue's thread need not: for other formats than raw, for operations that take long
//! (discard, zeroes), and where there is no io_uring.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use viaduct_memory::Call;

use super::image::Image;
use super::operation::Operation;

/// As many as wait for a disk at a time.
const THREADS: usize = 8;

/// Where a queue's thread hears of what was done for it.
#[derive(Debug)]
pub(super) struct Completions {
    done: Mutex<Vec<(u32, io::Result<()>)>>,
    event: File,
    signal: Call,
}

impl Completions {
    pub fn new() -> io::Result<Arc<Completions>> {
        // SAFETY: a fresh descriptor, taken over at once.
        let event = unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
                fd if fd >= 0 => File::from_raw_fd(fd),
                _ => return Err(io::Error::last_os_error()),
            }
        };
        let signal = Call::new(event.try_clone()?.into())?;
        Ok(Arc::new(Completions { done: Mutex::default(), event, signal }))
    }

    /// Readable while there is something to take.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Moves what was done to the end of `done`.
    pub fn take(&self, done: &mut Vec<(u32, io::Result<()>)>) {
        let mut waiting = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.is_empty() {
            // Nothing there, if the signal is still on its way: then there will be one wake-up too many.
            let _ = (&self.event).read(&mut [0; 8]);
            done.append(&mut waiting);
        }
    }

    fn put(&self, slot: u32, result: io::Result<()>) {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push((slot, result));
        self.signal.signal();
    }
}

struct Job {
    operation: Operation,
    durable: bool,
    slot: u32,
    to: Arc<Completions>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("image", &self.shared.image).finish_non_exhaustive()
    }
}

/// The threads of one device. They are started when there is work for them, and end with it.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    image: Arc<dyn Image>,
    work: Mutex<Work>,
    changed: Condvar,
}

#[derive(Default)]
struct Work {
    jobs: VecDeque<Job>,
    idle: usize,
    ended: bool,
}

impl Pool {
    pub fn new(image: Arc<dyn Image>) -> Pool {
        let shared = Shared { image, work: Mutex::default(), changed: Condvar::new() };
        Pool { shared: Arc::new(shared), threads: Mutex::default() }
    }

    /// Has `operation` done; `to` is told, under the number `slot`.
    pub fn submit(&self, operation: Operation, durable: bool, slot: u32, to: &Arc<Completions>) {
        let mut work = self.shared.work.lock().unwrap_or_else(PoisonError::into_inner);
        work.jobs.push_back(Job { operation, durable, slot, to: to.clone() });
        let start = work.idle < work.jobs.len();
        drop(work);
        self.shared.changed.notify_one();
        if start {
            self.start_thread();
        }
    }

    fn start_thread(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if threads.len() >= THREADS {
            return;
        }
        let shared = self.shared.clone();
        let started = std::thread::Builder::new().name("viaduct-disk".into()).spawn(move || shared.serve());
        match started {
            Ok(thread) => threads.push(thread),
            // The others go on; without any, whoever asks waits himself.
            Err(_) if !threads.is_empty() => {}
            Err(_) => {
                let job = self.shared.work.lock().unwrap_or_else(PoisonError::into_inner).jobs.pop_front();
                job.into_iter().for_each(|job| self.shared.run(&job));
            }
        }
    }
}

impl Shared {
    fn serve(&self) {
        loop {
            let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
            let job = loop {
                if let Some(job) = work.jobs.pop_front() {
                    break job;
                }
                if work.ended {
                    return;
                }
                work.idle += 1;
                work = self.changed.wait(work).unwrap_or_else(PoisonError::into_inner);
                work.idle -= 1;
            };
            drop(work);
            self.run(&job);
        }
    }

    fn run(&self, job: &Job) {
        // A format's driver that gives up on an image must not take the thread with it, and the request.
        let result = catch_unwind(AssertUnwindSafe(|| job.operation.run(&*self.image, job.durable)));
        job.to.put(
            job.slot,
            result.unwrap_or_else(|_| Err(io::Error::other("the image's driver gave up; is it damaged?"))),
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.work.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}
