//! The fault guard: a front-end that truncates its file must not kill us.
//!
//! # Theory of operation
//!
//! A front-end shares a file. We check that it is long enough and map it, and then the front-end makes it shorter (or
//! the file system has no page left for a hole, or a page of memory goes bad). The next access to a page that is gone
//! raises SIGBUS in the thread that made it, whose default is the end of the process: one front-end would take all
//! guests along.
//!
//! So every mapping is entered into a table, and our handler looks up the fault's address there. In a mapping of ours
//! it replaces *all* of that mapping by anonymous zeroes, marks it, and returns: the interrupted instruction is run
//! again, succeeds, and reads zeroes. The code around it notices nothing; zeroes are checked like anything else a guest
//! may write. Whoever owns the port asks [`GuestMemory::faulted`](crate::GuestMemory::faulted) and cuts it off. A fault
//! anywhere else is passed on to the handler that was there before ours.
//!
//! # Why that is safe
//!
//! *Async-signal-safety.* The handler uses atomics and system calls, nothing that allocates or locks, and keeps
//! `errno`. The table is a list of fixed blocks that are never freed, so it can be walked at any moment.
//!
//! *A mapping that comes or goes meanwhile.* Entries change under a mutex that the handler never takes. Each is guarded
//! by a sequence number, odd while it changes: a reader that sees an odd number, or a different one after reading,
//! skips the entry. It skips none that matters: the thread that faulted is using the mapping, which is therefore alive
//! (that is what the `unsafe` accessors ask of their callers), and an entry is written only before the first use of its
//! mapping and after the last. For the same reason nothing else can take the mapping's place before the replacement is
//! done.
//!
//! *Several threads fault in one mapping.* The first one to advance the entry's state replaces the pages. The others
//! return and fault again, or find the new pages.
//!
//! *Handlers of others.* Python's `faulthandler`, or a library, may have set its own; ours is put back in front
//! whenever a mapping is made, and calls the other for faults that are not ours.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, PoisonError};

/// Entries in a block of the table.
const BLOCK: usize = 512;

/// The mapping's pages are the file's.
const INTACT: u8 = 0;
/// A handler is replacing them.
const REPLACING: u8 = 1;
/// They are anonymous zeroes.
const REPLACED: u8 = 2;

/// One mapping. Changed only under [`WRITERS`], except for `state`, which the handler advances.
struct Entry {
    sequence: AtomicU32,
    state: AtomicU8,
    start: AtomicUsize,
    /// 0: the entry is free.
    len: AtomicUsize,
}

struct Block {
    entries: [Entry; BLOCK],
    next: AtomicPtr<Block>,
}

impl Block {
    const fn new() -> Block {
        Block {
            entries: [const {
                Entry {
                    sequence: AtomicU32::new(0),
                    state: AtomicU8::new(INTACT),
                    start: AtomicUsize::new(0),
                    len: AtomicUsize::new(0),
                }
            }; BLOCK],
            next: AtomicPtr::new(std::ptr::null_mut()),
        }
    }
}

static FIRST: Block = Block::new();
static WRITERS: Mutex<()> = Mutex::new(());
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// How many mappings of this process have faulted so far. It never falls, so a poller that finds it unchanged need not
/// look at its mappings.
#[inline]
pub fn count() -> u64 {
    FAULTS.load(Ordering::Acquire)
}

/// A mapping's entry in the table; taken out when dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    entry: &'static Entry,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Registration {
    /// Guards the pages at `start`, `len` bytes (not 0), which are mapped and remain so until this is dropped.
    pub(crate) fn new(start: usize, len: usize) -> Registration {
        debug_assert_ne!(len, 0);
        let _writer = WRITERS.lock().unwrap_or_else(PoisonError::into_inner);
        install();
        let mut block = &FIRST;
        let entry = loop {
            if let Some(free) = block.entries.iter().find(|entry| entry.len.load(Ordering::Relaxed) == 0) {
                break free;
            }
            let next = block.next.load(Ordering::Acquire);
            block = if next.is_null() {
                let added: &'static Block = Box::leak(Box::new(Block::new()));
                block.next.store(std::ptr::from_ref(added).cast_mut(), Ordering::Release);
                added
            } else {
                // SAFETY: blocks are made by the branch above and never freed, and are shared only as `&Block`.
                unsafe { &*next }
            };
        };
        entry.write(start, len);
        Registration { entry }
    }

    #[inline]
    pub(crate) fn faulted(&self) -> bool {
        self.entry.state.load(Ordering::Acquire) != INTACT
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _writer = WRITERS.lock().unwrap_or_else(PoisonError::into_inner);
        self.entry.write(0, 0);
    }
}

impl Entry {
    /// Only under [`WRITERS`].
    fn write(&self, start: usize, len: usize) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        // A reader that sees one of the values below sees the odd number too.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.state.store(INTACT, Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// Start and length, unless the entry is free or changing.
    fn read(&self) -> Option<(usize, usize)> {
        let before = self.sequence.load(Ordering::Acquire);
        let (start, len) = (self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let after = self.sequence.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2) && len != 0).then_some((start, len))
    }
}

fn find(addr: usize) -> Option<(&'static Entry, usize, usize)> {
    let mut block = &FIRST;
    loop {
        for entry in &block.entries {
            match entry.read() {
                Some((start, len)) if addr.wrapping_sub(start) < len => return Some((entry, start, len)),
                _ => {}
            }
        }
        let next = block.next.load(Ordering::Acquire);
        if next.is_null() {
            return None;
        }
        // SAFETY: blocks are never freed, and shared only as `&Block`.
        block = unsafe { &*next };
    }
}

/// The handler that was there before ours.
struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written under `WRITERS` into the slot that `PREVIOUS_SLOT` does not name, and read only from the one it
// names.
unsafe impl Sync for Previous {}

static PREVIOUS: [Previous; 2] = [const { Previous(UnsafeCell::new(MaybeUninit::zeroed())) }; 2];
/// Which of [`PREVIOUS`] is valid: all-zero bytes, the state at the start, mean the default action.
static PREVIOUS_SLOT: AtomicUsize = AtomicUsize::new(0);

/// Puts our handler in front of whatever handles SIGBUS now. Only under [`WRITERS`].
fn install() {
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    // SAFETY: `sigaction` is plain data for which zeroes are valid. The slot written is not the one handlers read; it
    // could be only for a handler that began before the last but one replacement of SIGBUS's action and still runs.
    unsafe {
        let mut current: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut current);
        if current.sa_sigaction == handler as usize {
            return;
        }
        let slot = 1 - PREVIOUS_SLOT.load(Ordering::Relaxed);
        *PREVIOUS[slot].0.get() = MaybeUninit::new(current);
        PREVIOUS_SLOT.store(slot, Ordering::Release);
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = handler as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut());
    }
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a valid `info`, and errno is this thread's own.
    let (code, addr, errno) = unsafe { ((*info).si_code, (*info).si_addr() as usize, *libc::__errno_location()) };
    // Codes above 0 are the kernel's; in a signal that somebody sent the address means nothing.
    if code <= 0 || !replace(code, addr) {
        pass_on(signal, info, context, addr);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Whether the access may be tried again: it lies in a mapping of ours, which now has pages.
fn replace(code: c_int, addr: usize) -> bool {
    let Some((entry, start, len)) = find(addr) else { return false };
    match entry.state.compare_exchange(INTACT, REPLACING, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            // SAFETY: the thread that faulted keeps the mapping alive, so the range is its pages and nothing else's.
            let replaced = unsafe { map_zeroes(start, len) || map_sparse_file(start, len) };
            entry.state.store(REPLACED, Ordering::Release);
            FAULTS.fetch_add(1, Ordering::Release);
            replaced
        }
        Err(REPLACING) => true,
        // Late: the pages came between the fault and its handling. Only bad memory can make anonymous pages fault
        // again.
        Err(_) => code == libc::BUS_ADRERR,
    }
}

const ACCESS: c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Puts anonymous pages in the place of the range; says whether it did.
///
/// # Safety
/// The range must be pages of one mapping that nothing but guest memory is kept in.
unsafe fn map_zeroes(start: usize, len: usize) -> bool {
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the caller's promise.
    unsafe { libc::mmap(start as *mut c_void, len, ACCESS, flags, -1, 0) != libc::MAP_FAILED }
}

/// The same with a file of nothing but holes, for a host that does not promise so many anonymous pages
/// (`vm.overcommit_memory` 2): its pages count one by one, when they are touched.
///
/// # Safety
/// As for [`map_zeroes`].
unsafe fn map_sparse_file(start: usize, len: usize) -> bool {
    let Ok(size) = libc::off_t::try_from(len) else { return false };
    // SAFETY: the caller's promise for the range; the descriptor is closed here and nowhere else.
    unsafe {
        let file = libc::memfd_create(c"viaduct-lost".as_ptr(), libc::MFD_CLOEXEC);
        if file < 0 {
            return false;
        }
        let done = libc::ftruncate(file, size) == 0
            && libc::mmap(start as *mut c_void, len, ACCESS, libc::MAP_FIXED | libc::MAP_SHARED, file, 0)
                != libc::MAP_FAILED;
        libc::close(file);
        done
    }
}

/// Where the last fault that was not ours happened, and how often in a row.
static FOREIGN: (AtomicUsize, AtomicU32) = (AtomicUsize::new(0), AtomicU32::new(0));
/// A handler that returns without mending anything is called this often for one address before the default action.
const FOREIGN_TRIES: u32 = 8;

/// Whether the previous handler has had its turn in vain.
fn exhausted(info: &libc::siginfo_t, addr: usize) -> bool {
    if info.si_code <= 0 {
        // A handler that gives up puts back the one it found, perhaps us, and sends the signal again. Python's does.
        // SAFETY: a signal that was sent carries its sender; `getpid` has no conditions.
        return FOREIGN.1.load(Ordering::Relaxed) > 0 && unsafe { info.si_pid() == libc::getpid() };
    }
    if FOREIGN.0.swap(addr, Ordering::Relaxed) != addr {
        FOREIGN.1.store(0, Ordering::Relaxed);
    }
    FOREIGN.1.fetch_add(1, Ordering::Relaxed) >= FOREIGN_TRIES
}

fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void, addr: usize) {
    // SAFETY: the kernel gives a valid `info`. The slot named is written before it is named, and not again while it is.
    let (sent, exhausted, previous) = unsafe {
        let previous = (*PREVIOUS[PREVIOUS_SLOT.load(Ordering::Acquire)].0.get()).assume_init();
        ((*info).si_code <= 0, exhausted(&*info, addr), previous)
    };
    // SAFETY: `previous` is what the kernel would have called without us, with its kind of arguments. Setting the
    // default action and returning makes the fault, or the signal that is sent again, end the process.
    unsafe {
        match previous.sa_sigaction {
            libc::SIG_IGN if sent => {}
            handler if handler != libc::SIG_DFL && handler != libc::SIG_IGN && !exhausted => {
                if previous.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = std::mem::transmute(handler);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                    handler(signal);
                }
            }
            _ => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, std::ptr::null_mut());
                if sent {
                    libc::raise(signal);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_replacements_are_zeroes_that_can_be_written() {
        const LEN: usize = 1 << 30;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        for replace in [map_zeroes, map_sparse_file] {
            // SAFETY: a mapping of this test's own, with 2^30 bytes.
            unsafe {
                let start = libc::mmap(std::ptr::null_mut(), LEN, ACCESS, flags, -1, 0);
                assert_ne!(start, libc::MAP_FAILED);
                let byte = start.cast::<u8>().add(LEN / 2);
                byte.write_volatile(1);
                assert!(replace(start as usize, LEN));
                assert_eq!(byte.read_volatile(), 0);
                byte.write_volatile(2);
                assert_eq!(byte.read_volatile(), 2);
                libc::munmap(start, LEN);
            }
        }
    }
}
