//! File descriptors that Python keeps.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use pyo3::exceptions::PyValueError;
use pyo3::{PyResult, pyfunction};
use viaduct_memory::Call;

/// A duplicate of one of Python's descriptors.
pub(crate) fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("{fd} is not a file descriptor")));
    }
    // SAFETY: borrowed only for the call that duplicates it, which fails if it is not open.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?)
}

/// What notifies a driver, by one of Python's descriptors.
pub(crate) fn call_of(fd: RawFd) -> PyResult<Call> {
    Ok(Call::new(duplicate(fd)?)?)
}

#[pyfunction]
pub(crate) fn signal_call(fd: RawFd) -> PyResult<bool> {
    Ok(call_of(fd)?.signal())
}
