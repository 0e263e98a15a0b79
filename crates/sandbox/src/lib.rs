//! Least privilege: what a process gives up once it knows that it will not need it.
//!
//! # Theory of operation
//!
//! Three mechanisms of the kernel, each of which can be missing, and each useful without the others:
//!
//! - [`capabilities`] takes the powers of root away, one by one, from a process that has them;
//! - [`access`] (Landlock) leaves parts of the file system read-only or invisible, and TCP closed;
//! - [`filter`] (seccomp) leaves the system calls that a switch and its interpreter make. Another one does not kill the
//!   process: it fails as if the kernel did not have it, and [`violation`] says so.
//!
//! The first two hold for the calling thread and for those that it starts, so they are applied before there are others; the
//! third for all threads. None can be taken back, and all are inherited by programs that the process starts. What shall be
//! given up is decided elsewhere; here is only how.

#![cfg(target_os = "linux")]

pub mod access;
pub mod capabilities;
pub mod filter;
mod system_calls;
pub mod violation;

/// Why something could not be given up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The kernel refused a call.
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
    /// No capability has this name.
    #[error("unknown capability {0:?}; they are named as in capabilities(7), such as CAP_NET_ADMIN")]
    UnknownCapability(String),
    /// The kernel has Landlock but refused the rules.
    #[error("Landlock refused the rules: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter could not be made.
    #[error("the seccomp filter cannot be made: {0}")]
    Filter(String),
}

fn system(what: &'static str) -> SandboxError {
    SandboxError::System(what, std::io::Error::last_os_error())
}
