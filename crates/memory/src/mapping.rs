//! One `mmap` of a front-end's file.

use std::os::fd::OwnedFd;

/// A shared mapping of a part of a file, unmapped when the last user lets go.
#[derive(Debug)]
pub struct Mapping {
    pub(crate) start: *mut u8,
    pub(crate) len: usize,
    #[allow(dead_code)]
    file: OwnedFd,
}

// SAFETY: the mapping is plain shared memory; access goes through the rules of this crate.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}
