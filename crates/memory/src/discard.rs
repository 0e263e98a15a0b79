//! Giving guest pages back to the system: what a balloon is for (virtio 1.2, 5.5.6).
//!
//! # Theory of operation
//!
//! Guest memory is a file in memory that several processes map, so unmapping our part would free nothing. `MADV_REMOVE`
//! punches a hole into the file where a mapping lies: the pages are gone for all of them and read as zeroes until
//! somebody writes, the guest included. That needs no descriptor, which a [`Mapping`](crate::Mapping) does not keep.
//!
//! Anonymous memory has no such file: `MADV_DONTNEED` drops its pages, with the same effect. Memory over a file that only gives
//! the first content keeps what it has: its pages would read as that file has them.
//!
//! Only whole pages of the system that lie inside the span are given back: its neighbours are somebody else's. In a file
//! of huge pages the system gives back those that are covered at once, and zeroes the rest.

use std::io;

use crate::Span;

/// Gives the whole pages inside `span` back to the system. Returns how many bytes those were.
///
/// # Safety
/// The memory the span was translated from must be alive.
///
/// # Errors
/// What `madvise` answers: the file is sealed against writes, or it is none whose pages can be removed.
pub unsafe fn discard(span: Span) -> io::Result<u64> {
    // SAFETY: no memory is involved.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let start = span.as_ptr();
    let before = start.align_offset(page);
    let Some(inside) = (span.len() as usize).checked_sub(before) else { return Ok(0) };
    let bytes = inside / page * page;
    if bytes == 0 {
        return Ok(0);
    }
    // SAFETY: the pages lie in a mapping that the caller keeps alive. That they change under everybody who looks is the
    // nature of guest memory: it is only read and written by copies.
    let advise = |advice| match unsafe { libc::madvise(start.wrapping_add(before).cast(), bytes, advice) } {
        0 => Ok(bytes as u64),
        _ => Err(io::Error::last_os_error()),
    };
    match advise(libc::MADV_REMOVE) {
        // There is no file. One that is mapped privately is EACCES.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => advise(libc::MADV_DONTNEED),
        done => done,
    }
}
