//! io_uring for a raw image: the kernel moves bytes between the guest's memory and the file, many requests at a time, and
//! needs one system call for all that are there.
//!
//! A request has the number of its slot, and at most one operation at a time: one that moved only a part is followed by
//! another for the rest. So there is always room in the ring.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use viaduct_memory::Span;

use super::buffer::{as_iovecs, zero_from};
use super::image::Image;
use super::raw::RawImage;

/// What is asked of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read,
    /// Durable or not.
    Write(bool),
    Flush,
}

#[derive(Debug)]
struct Transfer {
    action: Action,
    offset: u64,
    /// Bytes in all, and those moved so far.
    len: u64,
    done: u64,
    spans: Vec<Span>,
    /// Read by the kernel until the operation ends.
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the iovecs are addresses and lengths, like spans; only the kernel follows them.
unsafe impl Send for Transfer {}

/// The operations of one queue.
pub(super) struct Uring {
    ring: IoUring,
    image: Arc<dyn Image>,
    transfers: Vec<Transfer>,
    in_flight: usize,
    /// What the kernel has answered, while it is looked through.
    answers: Vec<(u64, i32)>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

/// The only file that is registered.
const FILE: types::Fixed = types::Fixed(0);

impl Uring {
    /// A ring for `image` with `slots` operations at a time, a power of two; none if the image is not raw.
    ///
    /// # Errors
    /// Those of io_uring_setup(2): the system may have none to give.
    pub fn new(image: &Arc<dyn Image>, slots: u32) -> io::Result<Option<Uring>> {
        let Some(raw) = image.raw() else { return Ok(None) };
        let ring = IoUring::new(slots)?;
        ring.submitter().register_files(&[raw.fd().as_raw_fd()])?;
        let transfer =
            |_| Transfer { action: Action::Flush, offset: 0, len: 0, done: 0, spans: Vec::new(), iovecs: Vec::new() };
        let transfers = (0..slots).map(transfer).collect();
        Ok(Some(Uring { ring, image: image.clone(), transfers, in_flight: 0, answers: Vec::new() }))
    }

    /// Readable while there are answers.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps its descriptor open as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Begins an operation on `data` under a free number; [`reap`](Uring::reap) tells when it has ended. Its pieces come back
    /// with [`take_spans`](Uring::take_spans).
    ///
    /// # Safety
    /// The memory of `data` stays alive until then, or until this is dropped.
    pub unsafe fn start(&mut self, slot: u32, action: Action, offset: u64, data: &mut Vec<Span>) {
        let transfer = &mut self.transfers[slot as usize];
        std::mem::swap(&mut transfer.spans, data);
        (transfer.action, transfer.offset, transfer.done) = (action, offset, 0);
        transfer.len = transfer.spans.iter().map(|span| u64::from(span.len())).sum();
        self.in_flight += 1;
        self.push(slot);
    }

    /// Puts the pieces of an operation that has ended back where they came from.
    pub fn take_spans(&mut self, slot: u32, data: &mut Vec<Span>) {
        std::mem::swap(&mut self.transfers[slot as usize].spans, data);
    }

    fn push(&mut self, slot: u32) {
        let entry = self.transfers[slot as usize].entry().user_data(slot.into());
        // SAFETY: pieces, their memory and the iovecs stay as they are until the operation has ended: `start`'s caller keeps
        // the memory, and the transfer is not touched before its answer. Where a guest has cut the file behind its memory the
        // answer is EFAULT.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit();
        }
    }

    /// Hands what was begun to the kernel.
    pub fn submit(&mut self) {
        if self.ring.submission().is_empty() {
            return;
        }
        // EAGAIN and EBUSY pass; a signal too. What is left is handed over the next time.
        let _ = self.ring.submit();
    }

    /// Moves the numbers of operations that have ended, and how, to the end of `done`.
    pub fn reap(&mut self, done: &mut Vec<(u32, io::Result<()>)>) {
        if self.in_flight == 0 {
            return;
        }
        let mut answers = std::mem::take(&mut self.answers);
        answers.extend(self.ring.completion().map(|answer| (answer.user_data(), answer.result())));
        let mut again = false;
        for (slot, result) in answers.drain(..) {
            let slot = slot as u32;
            // The image is raw, or there would be no ring.
            let Some(raw) = self.image.raw() else { continue };
            match self.transfers[slot as usize].advance(raw, result) {
                Some(result) => {
                    self.in_flight -= 1;
                    done.push((slot, result));
                }
                None => {
                    self.push(slot);
                    again = true;
                }
            }
        }
        self.answers = answers;
        if again {
            self.submit();
        }
    }
}

impl Transfer {
    /// The next operation.
    fn entry(&mut self) -> squeue::Entry {
        let offset = self.offset + self.done;
        let sync = if self.action == Action::Write(true) { libc::RWF_DSYNC } else { 0 };
        match (self.action, self.spans.as_slice()) {
            (Action::Flush, _) => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            (Action::Read, [span]) => {
                let rest = span.skip(self.done as u32);
                opcode::Read::new(FILE, rest.as_ptr(), rest.len()).offset(offset).build()
            }
            (Action::Write(_), [span]) => {
                let rest = span.skip(self.done as u32);
                opcode::Write::new(FILE, rest.as_ptr(), rest.len()).offset(offset).rw_flags(sync).build()
            }
            (action, spans) => {
                as_iovecs(spans, self.done, &mut self.iovecs);
                let (first, count) = (self.iovecs.as_ptr(), self.iovecs.len() as u32);
                if action == Action::Read {
                    opcode::Readv::new(FILE, first, count).offset(offset).build()
                } else {
                    opcode::Writev::new(FILE, first, count).offset(offset).rw_flags(sync).build()
                }
            }
        }
    }

    /// What the kernel's answer makes of it; none if it goes on.
    fn advance(&mut self, raw: &RawImage, answer: i32) -> Option<io::Result<()>> {
        let Ok(moved) = u64::try_from(answer) else {
            return match -answer {
                libc::EINTR | libc::EAGAIN => None,
                error if self.action == Action::Flush => Some(raw.flushed(Err(io::Error::from_raw_os_error(error)))),
                error => Some(Err(io::Error::from_raw_os_error(error))),
            };
        };
        self.done += moved;
        match self.action {
            Action::Flush => Some(raw.flushed(Ok(()))),
            _ if self.done >= self.len => Some(Ok(())),
            _ if moved > 0 => None,
            Action::Read => Some(raw.read_to_end(self.offset, self.done, self.len).map(|done| {
                // SAFETY: as long as the operation lasts, the memory is alive.
                unsafe { zero_from(&self.spans, done) };
            })),
            Action::Write(_) => Some(Err(io::ErrorKind::WriteZero.into())),
        }
    }
}

impl Drop for Uring {
    /// The kernel writes into memory that may go away after this.
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight > 0 {
            // An interrupted wait is waited for again.
            let _ = self.ring.submit_and_wait(1);
            self.reap(&mut done);
        }
    }
}
