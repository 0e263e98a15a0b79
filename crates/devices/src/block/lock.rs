//! Locks by which machines, ours and QEMU's, keep away from each other's disks.
//!
//! # How they work
//!
//! QEMU locks single bytes of an image, shared, with locks of the open file description (F_OFD_SETLK; fcntl(2)): byte 100 + n
//! says "I do n", byte 200 + n says "nobody else may do n". Whoever opens the image takes its bytes and then looks whether
//! somebody else holds the byte that contradicts: 200 + n for what it does, 100 + n for what it forbids. The content of the
//! bytes does not matter, and a disk may be shorter than that.
//!
//! n is 0 for reading consistently, 1 for writing, 3 for changing the size.
//!
//! The locks end with the process. A process that was killed lets go a moment later where requests of its were still under
//! way, so a conflict is looked at again for a while.

use std::fmt::{self, Display};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

const DOES: i64 = 100;
const FORBIDS: i64 = 200;

const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// How long a process that was killed may take to let go.
const PATIENCE: Duration = Duration::from_secs(2);

/// What somebody else does with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// Writes to it.
    Writes,
    /// Lets nobody else write.
    ForbidsWriting,
    /// Changes its size.
    Resizes,
    /// Lets nobody else read, or change the size.
    ForbidsThat,
}

impl Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Conflict::Writes => "another process writes to it",
            Conflict::ForbidsWriting => "another process has it open and allows no writers",
            Conflict::Resizes => "another process may change its size",
            Conflict::ForbidsThat => "another process has it open and allows nobody else",
        })
    }
}

/// Takes the image, or says why not. A file system without locks gives none.
pub(super) fn lock(file: &File, read_only: bool, resizes: bool) -> io::Result<Option<Conflict>> {
    let mut does = vec![READ];
    does.extend((!read_only).then_some(WRITE));
    does.extend((!read_only && resizes).then_some(RESIZE));
    let forbids = [WRITE, RESIZE];
    let until = Instant::now() + PATIENCE;
    loop {
        for byte in does.iter().map(|n| DOES + n).chain(forbids.iter().map(|n| FORBIDS + n)) {
            match set(file, byte) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::EINVAL)) => {
                    return Ok(None);
                }
                done => done?,
            }
        }
        let Some(conflict) = contradiction(file, &does, &forbids)? else { return Ok(None) };
        release(file)?;
        if Instant::now() >= until {
            return Ok(Some(conflict));
        }
        sleep(Duration::from_millis(20));
    }
}

fn contradiction(file: &File, does: &[i64], forbids: &[i64]) -> io::Result<Option<Conflict>> {
    for &n in does {
        if held(file, FORBIDS + n)? {
            return Ok(Some(if n == WRITE { Conflict::ForbidsWriting } else { Conflict::ForbidsThat }));
        }
    }
    for &n in forbids {
        if held(file, DOES + n)? {
            return Ok(Some(if n == WRITE { Conflict::Writes } else { Conflict::Resizes }));
        }
    }
    Ok(None)
}

fn request(kind: i32, start: i64, len: i64) -> libc::flock {
    // SAFETY: all-zero bytes are a valid structure.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (start, len);
    lock
}

fn control(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: an open descriptor and a valid local.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes a byte, shared.
fn set(file: &File, byte: i64) -> io::Result<()> {
    control(file, libc::F_OFD_SETLK, &mut request(libc::F_RDLCK, byte, 1))
}

/// Lets go of all bytes.
fn release(file: &File) -> io::Result<()> {
    control(file, libc::F_OFD_SETLK, &mut request(libc::F_UNLCK, DOES, FORBIDS))
}

/// Whether anybody else has taken a byte.
fn held(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = request(libc::F_WRLCK, byte, 1);
    control(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
