//! The page that KVM and this process share about one vCPU, as far as other threads may touch it, and the signal that gets
//! a vCPU thread out of the guest.
//!
//! # Theory of operation
//!
//! A signal alone can be lost: it may arrive when the thread has decided to run the guest but has not yet entered the
//! kernel. So [`Kick::kick`] first sets `immediate_exit` in the shared page, which the kernel looks at when it is entered,
//! and then sends the signal, which ends a run that has begun already (Documentation/virt/kvm/api.rst, "immediate_exit").
//! The flag stays set until the thread has seen why, so nothing is lost. The signal's handler does nothing.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, addr_of, addr_of_mut};
use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::engine::{EngineError, Kick};

/// A mapping of a vCPU's `kvm_run`, and who runs that vCPU.
pub(super) struct RunPage {
    run: NonNull<kvm_run>,
    size: usize,
    /// The thread that the signal goes to; 0: none yet.
    thread: AtomicI32,
}

// SAFETY: other threads touch only `immediate_exit`, atomically; the rest is read by the thread that owns the vCPU.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of `vcpu`, whose size KVM has told.
    pub(super) fn map(vcpu: &impl AsRawFd, size: usize) -> io::Result<RunPage> {
        // SAFETY: a new mapping of a descriptor that KVM lets be mapped; nothing else is at the address we get.
        let page = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), 0)
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let run = NonNull::new(page.cast()).ok_or(io::ErrorKind::AddrInUse)?;
        Ok(RunPage { run, size, thread: AtomicI32::new(0) })
    }

    /// Bytes of one access of the port exit that the vCPU has just returned with.
    pub(super) fn port_width(&self) -> usize {
        // SAFETY: mapped while `self` is; the owner's thread asks, so KVM is not writing.
        usize::from(unsafe { addr_of!((*self.run.as_ptr()).__bindgen_anon_1.io.size).read_volatile() })
    }

    /// What the kernel says of an internal error: its number, and the words that came with it.
    pub(super) fn internal_error(&self) -> (u32, Vec<u64>) {
        // SAFETY: as in `port_width`.
        let error = unsafe { addr_of!((*self.run.as_ptr()).__bindgen_anon_1.internal).read_volatile() };
        (error.suberror, error.data.into_iter().take(error.ndata as usize).collect())
    }

    /// The calling thread runs this vCPU.
    pub(super) fn bind(&self) -> Result<(), EngineError> {
        static HANDLER: Once = Once::new();
        let mut result = Ok(());
        HANDLER.call_once(|| result = register_signal_handler(signal(), ignore));
        result.map_err(|error| EngineError::system(format!("handling signal {}", signal()), error))?;
        // SAFETY: takes no argument.
        self.thread.store(unsafe { libc::gettid() }, Ordering::SeqCst);
        Ok(())
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: mapped while `self` is, and a byte has no alignment; nobody in this process accesses it otherwise.
        unsafe { AtomicU8::from_ptr(addr_of_mut!((*self.run.as_ptr()).immediate_exit)) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: our mapping, of that size, and no pointer into it outlives `self`.
        unsafe { libc::munmap(self.run.as_ptr().cast(), self.size) };
    }
}

/// A vCPU's [`Kick`].
pub(super) struct RunKick(pub(super) Arc<RunPage>);

impl Kick for RunKick {
    fn kick(&self) {
        self.0.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.0.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: a system call with numbers; a thread that is gone is an error that does not matter, and another one
            // of this process that has its number loses at most a system call's patience.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    fn clear(&self) {
        self.0.immediate_exit().store(0, Ordering::SeqCst);
    }
}

fn signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
