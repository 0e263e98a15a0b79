//! A gdb stub: a stock gdb attaches to the guest's processors as to the threads of a program.
//!
//! # Theory of operation
//!
//! One thread listens on the loopback interface, because who may talk to a debugger may do anything to the guest. While gdb
//! is attached the machine is either paused, and the thread answers gdb's questions by looking at parked vCPUs
//! ([`target`]), or it runs, and the thread sleeps until gdb interrupts or a vCPU stops. The protocol is `gdbstub`'s.
//!
//! Memory is what the page tables of the vCPU make of an address at that moment. A breakpoint gets a debug register while
//! there are any, four on most processors: that works before a kernel has made its page tables, changes nothing in the
//! guest, and works where KVM emulates the guest's instructions. From the fifth on it is an INT3, which is in memory only
//! while the guest runs, and for which there must be memory when it is set. A breakpoint instruction of the guest's own is
//! given to the guest.
//!
//! When gdb goes, its breakpoints go and the guest goes on, unless its owner has paused it.
//!
//! What ends a guest - a triple fault, an instruction that cannot be emulated - is shown to gdb first, as a signal, so that
//! one can look at where it happened. When gdb then continues, or goes, it is the owner's turn.

mod target;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use gdbstub::common::Signal;
use gdbstub::conn::ConnectionExt;
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event as StubEvent, WaitForStopReasonError};
use gdbstub::stub::{GdbStub, MultiThreadStopReason};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::EngineError;
use crate::machine::Machine;
use target::GdbTarget;

/// How long one wait for a device that keeps a vCPU from parking is, before it is looked whether to go on waiting.
const PARK_PATIENCE: Duration = Duration::from_millis(100);

/// Listens for gdb until it is dropped.
pub struct GdbServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    quit: EventFd,
    /// The connection, so that whoever drops the server can end it.
    connection: Mutex<Option<TcpStream>>,
}

impl GdbServer {
    /// Listens on `port` of the loopback interface; 0: one that is free.
    ///
    /// # Errors
    /// [`EngineError::System`] if the port is taken.
    pub fn new(machine: Arc<Machine>, port: u16) -> Result<GdbServer, EngineError> {
        GdbServer::listen(machine, port, false)
    }

    /// The same, and the guest stands still until a gdb has come that lets it go on.
    ///
    /// # Errors
    /// As [`new`](GdbServer::new).
    pub fn awaited(machine: Arc<Machine>, port: u16) -> Result<GdbServer, EngineError> {
        GdbServer::listen(machine, port, true)
    }

    fn listen(machine: Arc<Machine>, port: u16, awaited: bool) -> Result<GdbServer, EngineError> {
        let system = |error| EngineError::system(format!("listening for gdb on port {port} of 127.0.0.1"), error);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(system)?;
        let address = listener.local_addr().map_err(system)?;
        let quit = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(system)?;
        let shared = Arc::new(Shared { quit, connection: Mutex::default() });
        if awaited {
            // Before anybody can attach.
            machine.leave_to_debugger();
        }
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name("gdb".into())
            .spawn(move || serve(&machine, &listener, &for_thread))
            .map_err(system)?;
        Ok(GdbServer { address, shared, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for GdbServer {
    fn drop(&mut self) {
        // An eventfd that was never written to takes a 1.
        let _ = self.shared.quit.write(1);
        if let Some(connection) = &*self.shared.connection.lock() {
            // Closed by gdb already, perhaps.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Sleeps until one of the descriptors can be read.
fn wait(fds: &[RawFd]) -> io::Result<()> {
    let mut polled: Vec<_> = fds.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: an array of our own, of that length.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
    if ready >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

fn has_quit(shared: &Shared) -> bool {
    // Read and put back: it stays signalled for who looks next.
    shared.quit.read().is_ok_and(|_| shared.quit.write(1).is_ok())
}

fn serve(machine: &Arc<Machine>, listener: &TcpListener, shared: &Shared) {
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    while wait(&[listener.as_raw_fd(), shared.quit.as_raw_fd()]).is_ok() && !has_quit(shared) {
        let Ok((connection, _)) = listener.accept() else { continue };
        if connection.set_nonblocking(false).is_err() {
            continue;
        }
        let Ok(clone) = connection.try_clone() else { continue };
        *shared.connection.lock() = Some(clone);
        if !has_quit(shared) {
            debug(machine, connection);
        }
        *shared.connection.lock() = None;
    }
}

/// One session. How it ended makes no difference: the guest goes on.
fn debug(machine: &Arc<Machine>, connection: TcpStream) {
    let mut target = GdbTarget::new(machine.clone());
    machine.debugger().attach(true);
    if target.pause() && target.prepare().is_ok() {
        let _ = GdbStub::new(connection).run_blocking::<EventLoop>(&mut target);
    }
    target.leave();
}

enum EventLoop {}

impl BlockingEventLoop for EventLoop {
    type Target = GdbTarget;
    type Connection = TcpStream;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut GdbTarget,
        connection: &mut TcpStream,
    ) -> Result<StubEvent<Self::StopReason>, WaitForStopReasonError<EngineError, io::Error>> {
        loop {
            if let Some((vcpu, event)) = target.debugger().take_stop() {
                // What the owner was told of is also his to resume.
                target.pause();
                target.clean();
                return Ok(StubEvent::TargetStopped(target.reason(vcpu, &event)));
            }
            if !target.is_started() {
                return Ok(StubEvent::TargetStopped(MultiThreadStopReason::Exited(0)));
            }
            wait(&[connection.as_raw_fd(), target.debugger().event().as_raw_fd()])
                .map_err(WaitForStopReasonError::Connection)?;
            // A connection that gdb has closed has a byte here, which then cannot be read.
            if ConnectionExt::peek(connection).map_err(WaitForStopReasonError::Connection)?.is_some() {
                let byte = ConnectionExt::read(connection).map_err(WaitForStopReasonError::Connection)?;
                return Ok(StubEvent::IncomingData(byte));
            }
        }
    }

    fn on_interrupt(target: &mut GdbTarget) -> Result<Option<Self::StopReason>, EngineError> {
        target.pause();
        target.clean();
        Ok(Some(MultiThreadStopReason::Signal(Signal::SIGINT)))
    }
}
