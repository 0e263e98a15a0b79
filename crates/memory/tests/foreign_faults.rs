//! Faults that are not ours keep their meaning: the handler that was there is called, and else the process ends. Each
//! case is a process of its own.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Output};

use viaduct_memory::{GuestMemory, Mapping, RegionCache, memfd};

const CASE: &str = "VIADUCT_FOREIGN_FAULT";

/// Runs [`case`] with `name` in another process.
fn run(name: &str) -> ExitStatus {
    output(name).status
}

fn output(name: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "case", "--ignored", "--test-threads=1"]).env(CASE, name);
    // A process that is meant to die leaves no core file.
    // SAFETY: `setrlimit` may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &none);
            Ok(())
        });
    }
    command.output().unwrap()
}

extern "C" fn exit_42(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a valid `info`; `_exit` may be called in a handler.
    unsafe { libc::_exit(if (*info).si_code == libc::BUS_ADRERR { 42 } else { 43 }) }
}

extern "C" fn exit_44(_: c_int) {
    // SAFETY: `_exit` may be called in a handler.
    unsafe { libc::_exit(44) }
}

extern "C" fn nothing(_: c_int) {}

/// Says that it was called, puts back the handler it found, and sends the signal again, as Python's `faulthandler`
/// does.
extern "C" fn give_up(signal: c_int) {
    // SAFETY: all three may be called in a handler; the action was written before this became the handler.
    unsafe {
        libc::write(2, b"!".as_ptr().cast(), 1);
        libc::sigaction(signal, (&raw const FOUND).cast(), std::ptr::null_mut());
        libc::raise(signal);
    }
}

static mut FOUND: std::mem::MaybeUninit<libc::sigaction> = std::mem::MaybeUninit::uninit();

fn handle(handler: usize, flags: c_int) {
    // SAFETY: zeroes are a valid `sigaction`, and the handlers keep to what one may do.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
    }
}

/// Reads beyond the end of a file that this crate knows nothing of.
fn fault_elsewhere() {
    let file = viaduct_file(1);
    // SAFETY: a new mapping; the read is meant to fault.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 8192, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        at.cast::<u8>().add(4096).read_volatile();
    }
}

fn viaduct_file(size: u64) -> std::os::fd::OwnedFd {
    memfd(size).unwrap()
}

fn guard() -> GuestMemory {
    GuestMemory::allocate(4096).unwrap()
}

#[test]
#[ignore = "run by the other tests, in a process of its own"]
fn case() {
    let informed = exit_42 as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    let plain = exit_44 as extern "C" fn(c_int) as usize;
    let lazy = nothing as extern "C" fn(c_int) as usize;
    let mut kept = vec![guard()];
    match std::env::var(CASE).unwrap().as_str() {
        "default" => {
            handle(libc::SIG_DFL, 0);
            kept.push(guard());
        }
        "ignored" => {
            handle(libc::SIG_IGN, 0);
            kept.push(guard());
        }
        "informed" => {
            handle(informed, libc::SA_SIGINFO);
            kept.push(guard());
        }
        "plain" => {
            handle(plain, 0);
            kept.push(guard());
        }
        "lazy" => {
            handle(lazy, 0);
            kept.push(guard());
        }
        "gives up" => {
            // SAFETY: one thread, before the handler is in place.
            unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), (&raw mut FOUND).cast()) };
            handle(give_up as extern "C" fn(c_int) as usize, 0);
            kept.push(guard());
        }
        "sent" => {
            handle(libc::SIG_DFL, 0);
            kept.push(guard());
            // SAFETY: a signal to ourselves.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        "ours" => {
            // A handler set later is passed over for a fault of ours as soon as there is a new mapping.
            handle(plain, 0);
            let file = viaduct_unsealed(8192);
            let mapping = Mapping::new(file.as_fd(), 0, 8192).unwrap();
            file.set_len(0).unwrap();
            // SAFETY: the mapping is alive.
            let byte = unsafe { mapping.as_ptr().read_volatile() };
            assert!(byte == 0 && mapping.faulted());
            std::process::exit(7);
        }
        other => panic!("no case {other}"),
    }
    // The guard does its own work in front of the other handler.
    assert!(kept.iter().all(|memory| memory.translate(&mut RegionCache::default(), 0, 1).is_some()));
    fault_elsewhere();
    std::process::exit(1);
}

fn viaduct_unsealed(size: u64) -> std::fs::File {
    // SAFETY: the name is a C string, and the descriptor is ours.
    let file = unsafe {
        let fd = libc::memfd_create(c"viaduct-test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

#[test]
fn without_another_handler_the_process_ends() {
    assert_eq!(run("default").signal(), Some(libc::SIGBUS));
}

#[test]
fn a_fault_cannot_be_ignored() {
    assert_eq!(run("ignored").signal(), Some(libc::SIGBUS));
}

#[test]
fn handler_with_information_gets_it() {
    assert_eq!(run("informed").code(), Some(42));
}

#[test]
fn handler_without_information_is_called() {
    assert_eq!(run("plain").code(), Some(44));
}

#[test]
fn handler_that_mends_nothing_does_not_loop() {
    assert_eq!(run("lazy").signal(), Some(libc::SIGBUS));
}

#[test]
fn handler_that_gives_up_is_called_once() {
    let output = output("gives up");
    assert_eq!(output.status.signal(), Some(libc::SIGBUS));
    assert!(output.stderr.ends_with(b"!") && !output.stderr.ends_with(b"!!"), "{:?}", output.stderr);
}

#[test]
fn signal_that_somebody_sends_ends_the_process() {
    assert_eq!(run("sent").signal(), Some(libc::SIGBUS));
}

#[test]
fn handler_set_later_does_not_take_our_faults() {
    assert_eq!(run("ours").code(), Some(7));
}
