//! Least privilege for Python: three calls that give something up for good.

use std::os::fd::RawFd;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use viaduct_sandbox::access::{self, Allowed, Enforced};
use viaduct_sandbox::{SandboxError, capabilities, filter, violation};

use crate::descriptors::duplicate;

fn to_python(error: SandboxError) -> PyErr {
    match error {
        SandboxError::UnknownCapability(_) => PyValueError::new_err(error.to_string()),
        _ => PyOSError::new_err(error.to_string()),
    }
}

/// Gives up all capabilities but these, and returns those that are left.
#[pyfunction]
pub fn drop_capabilities(keep: Vec<String>) -> PyResult<Vec<&'static str>> {
    capabilities::keep_only(&keep).map_err(to_python)
}

/// Leaves only these files and TCP ports. Returns how much of that the kernel enforces.
#[pyfunction]
pub fn restrict_access(
    readable: Vec<String>,
    executable: Vec<String>,
    writable: Vec<String>,
    listen: Vec<u16>,
) -> PyResult<&'static str> {
    let allowed = Allowed { readable, executable, writable, listen };
    Ok(match access::restrict(&allowed).map_err(to_python)? {
        Enforced::Fully => "fully",
        Enforced::Partly => "partly",
        Enforced::NotAtAll => "not at all",
    })
}

/// Leaves only the system calls that a switch makes. `event_fd` is written when another one was refused. `inherited`:
/// the filter is there already, from the process that started this one.
#[pyfunction]
pub fn filter_system_calls(event_fd: RawFd, inherited: bool) -> PyResult<()> {
    violation::watch(Some(duplicate(event_fd)?)).map_err(to_python)?;
    if inherited { Ok(()) } else { filter::install().map_err(to_python) }
}

/// System calls that were refused so far, and how often.
#[pyfunction]
pub fn refused_system_calls() -> Vec<(String, u64)> {
    violation::refused()
}
