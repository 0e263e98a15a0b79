//! A raw image: a regular file or a block device that is the disk, byte for byte.
//!
//! # Flushes that fail
//!
//! When the host cannot write back what it keeps for a file, it says so once, to the next fdatasync(2), and then counts those
//! pages as written. A driver that tried its flush again would be told that all is well. So once a flush has failed, every
//! later one fails too, until the image is opened anew.
//!
//! # Size
//!
//! The size is that at opening. A file whose last sector is not full reads as if zeroes followed. A file that became shorter
//! fails the reads that lie behind its end; a write there makes it longer again.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::buffer::{GuestBuffer, as_iovecs};
use super::image::{Format, Image, SECTOR};

/// A raw image.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    /// Bytes at opening.
    len: u64,
    flush_failed: AtomicBool,
}

/// Zeroes are written in pieces of this size where the system has no better way.
const ZEROES: usize = 1 << 16;

impl RawImage {
    /// The disk that `file` is.
    ///
    /// # Errors
    /// Those of lseek(2).
    pub fn new(mut file: File) -> io::Result<RawImage> {
        // For a block device too, whose metadata say 0.
        let len = file.seek(SeekFrom::End(0))?;
        Ok(RawImage { file, len, flush_failed: AtomicBool::new(false) })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What a flush comes to that the system answered so.
    pub(super) fn flushed(&self, answer: io::Result<()>) -> io::Result<()> {
        if answer.is_err() {
            self.flush_failed.store(true, Ordering::Relaxed);
        }
        match answer {
            Ok(()) if self.flush_failed.load(Ordering::Relaxed) => {
                Err(io::Error::other("an earlier flush failed, and what it lost is not known; open the image anew"))
            }
            answer => answer,
        }
    }

    /// Calls fallocate(2).
    fn allocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        loop {
            // SAFETY: a plain call on a descriptor of ours.
            let done = unsafe {
                libc::fallocate(
                    self.file.as_raw_fd(),
                    mode | libc::FALLOC_FL_KEEP_SIZE,
                    offset as libc::off_t,
                    len as libc::off_t,
                )
            };
            let error = io::Error::last_os_error();
            match error.kind() {
                _ if done == 0 => return Ok(()),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
    }

    /// Moves bytes with `transfer` until all have been moved; `Ok(0)` ends it. Returns how many.
    fn move_all(
        &self,
        data: &GuestBuffer,
        offset: u64,
        transfer: unsafe extern "C" fn(i32, *const libc::iovec, i32, i64) -> isize,
    ) -> io::Result<u64> {
        let (mut iovecs, mut done) = (Vec::new(), 0);
        loop {
            as_iovecs(data.spans(), done, &mut iovecs);
            if iovecs.is_empty() {
                return Ok(done);
            }
            let at = offset + done;
            // SAFETY: the buffer's memory is mapped, and where a guest has cut its file the system answers EFAULT.
            let moved =
                unsafe { transfer(self.file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, at as i64) };
            match u64::try_from(moved) {
                Ok(0) => return Ok(done),
                Ok(moved) => done += moved,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }

    /// What a read comes to that met the end of the file after `done` bytes of `data` from `offset`: behind the end that the
    /// file had at opening there are zeroes up to a full sector.
    pub(super) fn read_to_end(&self, offset: u64, done: u64, len: u64) -> io::Result<u64> {
        if done == len || offset + done >= self.len {
            return Ok(done);
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!(
                "the file has shrunk: it ends before byte {}, and had {} bytes when it was opened",
                offset + len,
                self.len
            ),
        ))
    }
}

/// Whether the system or the file system knows no such thing.
fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        self.len.next_multiple_of(SECTOR)
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn read(&self, offset: u64, data: &GuestBuffer) -> io::Result<()> {
        let done = self.move_all(data, offset, libc::preadv)?;
        self.read_to_end(offset, done, data.len())?;
        data.zero_from(done);
        Ok(())
    }

    fn write(&self, offset: u64, data: &GuestBuffer) -> io::Result<()> {
        let done = self.move_all(data, offset, libc::pwritev)?;
        if done < data.len() { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        self.flushed(self.file.sync_data())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, len) {
            Err(error) if unsupported(&error) => Ok(()),
            done => done,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let ways: &[i32] = if unmap {
            &[libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE]
        } else {
            &[libc::FALLOC_FL_ZERO_RANGE]
        };
        for &way in ways {
            match self.allocate(way, offset, len) {
                Err(error) if unsupported(&error) => {}
                done => return done,
            }
        }
        let zeroes = [0; ZEROES];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let now = (end - at).min(ZEROES as u64);
            self.file.write_all_at(&zeroes[..now as usize], at)?;
            at += now;
        }
        Ok(())
    }

    fn raw(&self) -> Option<&RawImage> {
        Some(self)
    }
}
