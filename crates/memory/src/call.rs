//! The descriptor by which a peer is notified ("call", vhost-user), written without any chance to block.
//!
//! # Theory of operation
//!
//! The descriptor is the front-end's as much as ours: it can fill the eventfd's counter, and take O_NONBLOCK back, which is
//! a flag of the open file that both share. A poller that looks whether a write would block, and then writes, loses the
//! race against one that does both in between, and waits for as long as the front-end likes. Every other port waits too.
//!
//! So an eventfd is not written at all. The kernel signals it: a request of Linux AIO may name an eventfd that is signalled
//! when the request ends (`IOCB_FLAG_RESFD`, io_submit(2)), and that signal is the one of the kernel's own interrupt paths,
//! which never waits and leaves a full counter full. The request itself is a read of no bytes from the same eventfd, which
//! fails at once and takes nothing: an eventfd gives eight bytes or none (eventfd(2)). A pipe, the protocol's other means, is
//! opened anew: the new open file's flags are ours alone.
//!
//! Each thread has an AIO context of its own, made when it notifies for the first time. Where the system has none to give
//! (a kernel without AIO, a sandbox, all of fs.aio-max-nr taken) or eventfds cannot be read so (before Linux 5.8), what is
//! left is to look and to write.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU32, Ordering};

/// A descriptor by which a peer is notified.
#[derive(Debug)]
pub struct Call {
    file: File,
    pipe: bool,
}

impl Call {
    /// Takes over an eventfd or the writing end of a pipe.
    ///
    /// # Errors
    /// A pipe that cannot be opened anew: its reading end, or /proc is not there.
    pub fn new(fd: OwnedFd) -> io::Result<Call> {
        let mut file = File::from(fd);
        // SAFETY: all-zero bytes are a valid structure, which the call fills.
        let pipe = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(file.as_raw_fd(), &mut stat) != 0 {
                return Err(io::Error::last_os_error());
            }
            stat.st_mode & libc::S_IFMT == libc::S_IFIFO
        };
        if pipe {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            file = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        }
        Ok(Call { file, pipe })
    }

    /// Signals once. Returns whether the peer has it now; a descriptor that is full or of another kind is the peer's own
    /// loss.
    pub fn signal(&self) -> bool {
        if self.pipe {
            return (&self.file).write(&ONE.to_ne_bytes()).is_ok();
        }
        signal_event_fd(&self.file)
    }
}

const ONE: u64 = 1;

thread_local!(static BELL: Option<Bell> = Bell::new().ok());

/// Signals the eventfd `fd` once, without ever waiting. Returns whether that worked.
fn signal_event_fd(mut fd: &File) -> bool {
    // While a thread ends there is no bell any more.
    let rung = BELL.try_with(|bell| bell.as_ref().is_some_and(|bell| bell.ring(fd)));
    rung == Ok(true) || (takes_more(fd) && fd.write(&ONE.to_ne_bytes()).is_ok())
}

/// Whether a write would not block, now.
#[cold]
fn takes_more(fd: &File) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid local.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 && poll.revents & libc::POLLOUT != 0 }
}

/// `struct iocb` of linux/aio_abi.h where little-endian.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_FLAG_RESFD: u32 = 1;

/// The head of the ring of completions, which the kernel maps into this process at the context's address
/// (`struct aio_ring`, the same since Linux 2.6).
#[repr(C)]
struct Completions {
    id: u32,
    slots: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compatible: u32,
    incompatible: u32,
    header_len: u32,
}

const AIO_RING_MAGIC: u32 = 0xa10a_10a1;
/// Requests at a time: each is over at once.
const REQUESTS: libc::c_long = 1;

/// One thread's AIO context.
struct Bell {
    context: libc::c_ulong,
}

impl Bell {
    fn new() -> io::Result<Bell> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the call writes a valid local.
        if unsafe { libc::syscall(libc::SYS_io_setup, REQUESTS, &mut context) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let bell = Bell { context };
        if bell.completions().is_none() {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        Ok(bell)
    }

    /// The ring of completions, if it is of the kind we know.
    fn completions(&self) -> Option<&Completions> {
        let ring = std::ptr::with_exposed_provenance::<Completions>(self.context as usize);
        // SAFETY: the kernel maps the ring at this address, on a page of its own, for as long as the context lives. It
        // writes `tail` alone after setting it up, so everything else may be read and `tail` is atomic.
        unsafe { ring.as_ref() }.filter(|ring| ring.magic == AIO_RING_MAGIC && ring.incompatible == 0)
    }

    /// Has the kernel signal `fd`.
    fn ring(&self, fd: &File) -> bool {
        let fd = fd.as_raw_fd() as u32;
        let mut request =
            Request { opcode: IOCB_CMD_PREAD, fd, flags: IOCB_FLAG_RESFD, event_fd: fd, ..Request::default() };
        let mut requests = [&raw mut request];
        // SAFETY: one request, alive during the call, at whose end it is over. It has no buffer.
        let submitted = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, requests.as_mut_ptr()) };
        if submitted != 1 {
            // In a child made by fork(2) there is no context any more, nor what it had mapped.
            return false;
        }
        // What has completed is of no interest; taking it makes room for the next one.
        if let Some(ring) = self.completions() {
            ring.head.store(ring.tail.load(Ordering::Acquire), Ordering::Release);
        }
        true
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and nothing is under way in it.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::FromRawFd;

    use super::*;

    fn event_fd(flags: i32) -> File {
        // SAFETY: a fresh descriptor, taken over at once.
        unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | flags)) }
    }

    fn value(mut fd: &File) -> u64 {
        let mut bytes = [0; 8];
        fd.read_exact(&mut bytes).expect("it was signalled");
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn an_event_fd_counts_every_signal() {
        let fd = event_fd(0);
        let call = Call::new(fd.try_clone().expect("a descriptor").into()).expect("an eventfd");
        for _ in 0..1000 {
            assert!(call.signal());
        }
        assert_eq!(value(&fd), 1000);
    }

    #[test]
    fn a_full_event_fd_that_blocks_does_not_block() {
        let fd = event_fd(0);
        (&fd).write_all(&(u64::MAX - 1).to_ne_bytes()).expect("it was empty");
        let call = Call::new(fd.try_clone().expect("a descriptor").into()).expect("an eventfd");
        for _ in 0..1000 {
            call.signal();
        }
        assert!(value(&fd) >= u64::MAX - 1);
    }

    #[test]
    fn a_full_pipe_that_blocks_does_not_block() {
        let (reader, writer) = io::pipe().expect("a pipe");
        let call = Call::new(writer.try_clone().expect("a descriptor").into()).expect("a pipe's end");
        let signalled = (0..1_000_000).take_while(|_| call.signal()).count();
        assert!((8..1_000_000).contains(&signalled), "{signalled}");
        // The front-end's own end still blocks, which shows whose flag was changed.
        // SAFETY: a plain fcntl call.
        assert_eq!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_GETFL) } & libc::O_NONBLOCK, 0);
        drop(reader);
        assert!(!call.signal(), "nobody reads");
    }
}
