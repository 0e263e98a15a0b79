//! Disk images: what a disk can do, and how one is opened.
//!
//! # Which format a file has
//!
//! A guest writes whatever it likes into a raw disk, also what looks like the header of another format: one that names any
//! file of the host as its backing file. So what a file contains never decides alone. It is raw unless somebody on the host
//! said otherwise, by `format` or by a name that ends in ".qcow2"; and a file that begins like a qcow2 image but was not
//! called one is refused until somebody says which it is.

use std::fmt::{self, Debug, Display};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::buffer::GuestBuffer;
use super::lock::{Conflict, lock};
use super::qcow2::{MAGIC, Qcow2Image};
use super::raw::RawImage;

/// Bytes in a sector, the unit of the protocol whatever the block size (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;

/// A disk's contents. Ranges lie inside [`size`](Image::size); several threads may ask at once.
pub trait Image: Debug + Send + Sync {
    /// Bytes, a multiple of [`SECTOR`].
    fn size(&self) -> u64;

    /// The format's name.
    fn format(&self) -> Format;

    /// Fills `data` with what is at `offset`.
    ///
    /// # Errors
    /// Those of the system; [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if the file has shrunk.
    fn read(&self, offset: u64, data: &GuestBuffer) -> io::Result<()>;

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// Those of the system.
    fn write(&self, offset: u64, data: &GuestBuffer) -> io::Result<()>;

    /// Makes durable what has been written.
    ///
    /// # Errors
    /// Those of the system.
    fn flush(&self) -> io::Result<()>;

    /// Gives room back. Whatever is read there afterwards is right.
    ///
    /// # Errors
    /// Those of the system, but none if it cannot be done here: it was a hint.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range zeroes; `unmap`: its room may be given back.
    ///
    /// # Errors
    /// Those of the system.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// The file that holds exactly the disk's bytes, if there is one.
    fn raw(&self) -> Option<&RawImage> {
        None
    }
}

/// How a disk lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's format with tables.
    Qcow2,
}

impl Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The system refuses it.
    #[error("{path}: {error}{advice}")]
    System {
        /// The image.
        path: String,
        /// What the system says.
        error: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// Not something that a disk can lie in.
    #[error("{path} is {found}; a disk lies in a regular file or a block device")]
    Kind {
        /// The image.
        path: String,
        /// What it is.
        found: &'static str,
    },
    /// It has no bytes.
    #[error("{0} is empty; give it a size first: truncate --size 10G {0}")]
    Empty(String),
    /// It looks like a qcow2 image and was not called one.
    #[error(
        "{0} begins like a qcow2 image, which a guest can write into a raw disk as well: say format qcow2 if it is one, or \
         format raw if a guest wrote that"
    )]
    Ambiguous(String),
    /// The content is wrong.
    #[error("{path}: {problem}")]
    Content {
        /// The image.
        path: String,
        /// What was found, what is allowed, what to do.
        problem: String,
    },
    /// Another process uses it.
    #[error(
        "{path} is in use: {conflict}; end the machine or program that has it open (fuser -v {path} names it), or open it \
         read-only in both"
    )]
    Locked {
        /// The image.
        path: String,
        /// What the other one does with it.
        conflict: Conflict,
    },
}

/// Opens a disk image. `format` is what the host's user says it is; without, see the module's text.
///
/// # Errors
/// [`OpenError`].
pub fn open(path: &Path, format: Option<Format>, read_only: bool) -> Result<Box<dyn Image>, OpenError> {
    let name = path.display().to_string();
    let system = |error: io::Error| {
        let advice = match error.raw_os_error() {
            Some(libc::ENOENT) => "; make one first: truncate --size 10G FILE",
            Some(libc::EACCES | libc::EROFS | libc::EPERM) if !read_only => "; it may still be opened read-only",
            _ => "",
        };
        OpenError::System { path: name.clone(), error, advice }
    };
    let opened = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(system)?;
    check_kind(&file, &name).map_err(system)??;
    wait_again(&file).map_err(system)?;
    let format = decide(path, &file, &name, format).map_err(system)??;
    if let Some(conflict) = lock(&file, read_only, format == Format::Qcow2).map_err(system)? {
        return Err(OpenError::Locked { path: name.clone(), conflict });
    }
    let image: Box<dyn Image> = match format {
        Format::Raw => Box::new(RawImage::new(file).map_err(system)?),
        Format::Qcow2 => Box::new(Qcow2Image::new(file, path, read_only)?),
    };
    if image.size() == 0 {
        return Err(OpenError::Empty(name));
    }
    Ok(image)
}

fn check_kind(file: &File, path: &str) -> io::Result<Result<(), OpenError>> {
    let kind = file.metadata()?.file_type();
    let found = match kind {
        _ if kind.is_file() || kind.is_block_device() => return Ok(Ok(())),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_char_device() => "a character device",
        _ if kind.is_fifo() => "a pipe",
        _ => "something else",
    };
    Ok(Err(OpenError::Kind { path: path.to_owned(), found }))
}

/// Takes back O_NONBLOCK, which was there for pipes only.
fn wait_again(file: &File) -> io::Result<()> {
    // SAFETY: plain fcntl calls on an open descriptor.
    let set = unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        flags >= 0 && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) == 0
    };
    if set { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn decide(path: &Path, file: &File, name: &str, format: Option<Format>) -> io::Result<Result<Format, OpenError>> {
    let mut start = [0; 4];
    let begins_so = file.read_at(&mut start, 0)? == start.len() && start == MAGIC;
    let called_so = path.extension().is_some_and(|suffix| suffix == "qcow2");
    Ok(match (format, begins_so, called_so) {
        (Some(Format::Raw), ..) => Ok(Format::Raw),
        (Some(Format::Qcow2), true, _) | (None, true, true) => Ok(Format::Qcow2),
        (Some(Format::Qcow2), false, _) | (None, false, true) => Err(OpenError::Content {
            path: name.to_owned(),
            problem: format!(
                "it begins with {start:02x?}, a qcow2 image with {MAGIC:02x?} (\"QFI\\xfb\"); is it a raw disk? Then say format \
                 raw"
            ),
        }),
        (None, true, false) => Err(OpenError::Ambiguous(name.to_owned())),
        (None, false, false) => Ok(Format::Raw),
    })
}

/// A path for messages.
pub(super) fn content(path: &Path, problem: impl Into<String>) -> OpenError {
    OpenError::Content { path: path.display().to_string(), problem: problem.into() }
}
