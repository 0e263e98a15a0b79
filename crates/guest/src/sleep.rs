//! Sleeping until one of several file descriptors is readable.

use std::os::fd::RawFd;
use std::time::Duration;

/// Sleeps until one of `fds` is readable, for at most `timeout`. A signal ends it early, which does no harm.
pub(crate) fn until_readable(fds: &[RawFd], timeout: Option<Duration>) {
    let mut polled: Vec<libc::pollfd> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let time = timeout.map(|t| libc::timespec {
        tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: t.subsec_nanos().into(),
    });
    // SAFETY: pointer and length are those of `polled`; `time` lives until the call returns; there is no signal mask.
    unsafe {
        libc::ppoll(
            polled.as_mut_ptr(),
            polled.len() as libc::nfds_t,
            time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref),
            std::ptr::null(),
        );
    }
}
