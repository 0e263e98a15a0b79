//! System calls that the filter refused: each fails as if the kernel did not have it, and is told.
//!
//! The kernel turns a refused call into SIGSYS (seccomp(2), SECCOMP_RET_TRAP). The handler does only what a signal
//! handler may (signal-safety(7)): it counts the call, writes a line on standard error the first time, signals an eventfd,
//! and makes the call return ENOSYS. Libraries then do without it where they can, and say so where they cannot.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};

use crate::{SandboxError, system, system_calls};

/// Numbers of system calls are below this on all machines that are supported.
const CALLS: usize = 1024;

static REFUSED: [AtomicU64; CALLS] = [const { AtomicU64::new(0) }; CALLS];
static SIGNAL: AtomicI32 = AtomicI32::new(-1);

/// System calls that have been refused in this process: name or number, and how often.
pub fn refused() -> Vec<(String, u64)> {
    let counts = REFUSED.iter().map(|count| count.load(Relaxed)).enumerate();
    counts.filter(|(_, count)| *count > 0).map(|(number, count)| (name(number), count)).collect()
}

fn name(number: usize) -> String {
    system_calls::name(number as i64).map_or_else(|| format!("number {number}"), str::to_owned)
}

/// Installs the handler. `signal`, an eventfd, is written whenever a call was refused; it stays open.
///
/// # Errors
/// [`SandboxError::System`]: the kernel refused the handler.
pub fn watch(signal: Option<OwnedFd>) -> Result<(), SandboxError> {
    if let Some(signal) = signal {
        SIGNAL.store(signal.into_raw_fd(), Relaxed);
    }
    // SAFETY: all-zero is a valid start; the handler has the signature that SA_SIGINFO asks for.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(system("SIGSYS cannot be handled")) }
}

/// Where the kernel puts the number of a refused call (siginfo_t, `_sigsys`: an address, the number, the architecture).
#[repr(C)]
struct RefusedCall {
    signo: i32,
    errno: i32,
    code: i32,
    _pad: i32,
    address: *mut libc::c_void,
    number: i32,
    architecture: u32,
}

/// linux/signal.h
const SYS_SECCOMP: i32 = 1;

extern "C" fn handle(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes both for SA_SIGINFO; the layout is that of a SIGSYS.
    let (code, number) = unsafe {
        let info = &*info.cast::<RefusedCall>();
        (info.code, info.number)
    };
    if code != SYS_SECCOMP {
        return;
    }
    // SAFETY: the kernel passes a ucontext_t, which is ours until we return.
    unsafe { fail(&mut *context.cast::<libc::ucontext_t>()) };
    let index = number as usize % CALLS;
    if REFUSED[index].fetch_add(1, Relaxed) == 0 {
        say(number);
    }
    let signal = SIGNAL.load(Relaxed);
    if signal >= 0 {
        // SAFETY: eight bytes of a constant, to an eventfd that stays open.
        unsafe { libc::write(signal, (&raw const ONE).cast(), 8) };
    }
}

static ONE: u64 = 1;

/// Lets the interrupted call return ENOSYS.
#[cfg(target_arch = "x86_64")]
fn fail(context: &mut libc::ucontext_t) {
    context.uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::ENOSYS);
}

/// Lets the interrupted call return ENOSYS.
#[cfg(target_arch = "aarch64")]
fn fail(context: &mut libc::ucontext_t) {
    context.uc_mcontext.regs[0] = -i64::from(libc::ENOSYS) as u64;
}

/// Writes one line, without anything that might allocate or lock.
fn say(number: i32) {
    let mut digits = [0u8; 10];
    let mut at = digits.len();
    let mut rest = number.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let name = system_calls::name(number.into()).unwrap_or("unnamed");
    let parts: [&[u8]; 5] = [
        b"viaduct: the sandbox refused system call ",
        &digits[at..],
        b" (",
        name.as_bytes(),
        b"), which failed with ENOSYS; if you need what it was for, start with --sandbox off, and please report it\n",
    ];
    let vectors = parts.map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    // SAFETY: the vectors point to constants and locals.
    unsafe { libc::writev(2, vectors.as_ptr(), vectors.len() as i32) };
}
