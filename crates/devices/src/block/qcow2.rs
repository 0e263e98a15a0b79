//! A qcow2 image: tables that say where in the file each cluster of the disk lies. The format is imago's; here is what we
//! let it open, and how guest memory gets there.
//!
//! An image that leans on another file (a backing file, an external data file) is refused: its header says which file, and an
//! image from somewhere else could name any. `qemu-img convert` makes one that stands alone.
//!
//! imago keeps the tables that it changes in memory until it is told to write them. Here that is before a write is
//! acknowledged: a driver does not notice that this process was killed and another goes on, so nothing may be lost with it.
//!
//! imago takes slices, and guest memory must never be one, so data goes through a buffer of our own.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::buffer::GuestBuffer;
use super::image::{Format, Image, OpenError, SECTOR, content};

/// How a qcow2 image begins.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes that are moved in one go.
const CHUNK: u64 = 1 << 20;

/// A qcow2 image.
#[derive(Debug)]
pub(super) struct Qcow2Image {
    /// Discarding moves clusters under those who read and write, so it is alone.
    access: RwLock<FormatAccess<Storage>>,
    size: u64,
}

impl Qcow2Image {
    pub fn new(file: File, path: &Path, read_only: bool) -> Result<Qcow2Image, OpenError> {
        check_header(&file, path)?;
        let wrong = |error: io::Error| content(path, format!("{error} (qcow2); qemu-img check may know more"));
        let options = StorageOpenOptions::new().write(!read_only).filename(path);
        let storage = Storage::from_open_file(file, options).map_err(wrong)?;
        let image = Qcow2::<Storage>::builder(storage).write(!read_only).backing(None).data_file(None);
        // Tables that are worse than imago expects must not take this process with them.
        let opened = catch_unwind(AssertUnwindSafe(|| image.open(DenyImplicitOpenGate::default())));
        let opened = opened.unwrap_or_else(|_| Err(io::Error::other("its tables make no sense")));
        let access = FormatAccess::new(opened.map_err(wrong)?);
        let size = access.size();
        if !size.is_multiple_of(SECTOR) {
            let problem =
                format!("a disk of {size} bytes, which is no multiple of {SECTOR}; qemu-img resize can mend that");
            return Err(content(path, problem));
        }
        Ok(Qcow2Image { access: RwLock::new(access), size })
    }

    fn fill_with_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = vec![0; len.min(CHUNK) as usize];
        let mut at = 0;
        while at < len {
            let now = &zeroes[..(len - at).min(CHUNK) as usize];
            self.access().write(now, offset + at)?;
            at += now.len() as u64;
        }
        Ok(())
    }

    fn access(&self) -> RwLockReadGuard<'_, FormatAccess<Storage>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What imago does not look at, or says less about (the qcow2 specification, "Header").
fn check_header(file: &File, path: &Path) -> Result<(), OpenError> {
    let mut header = [0; 104];
    let mut filled = 0;
    while let Ok(more @ 1..) = file.read_at(&mut header[filled..], filled as u64) {
        filled += more;
    }
    let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
    let (version, features) = (word(4), long(72));
    let problem = match () {
        () if filled < 72 || (version == 3 && filled < header.len()) => {
            format!("its header ends after {filled} bytes; it needs 72, or 104 in version 3: the file was cut")
        }
        () if !matches!(version, 2 | 3) => format!("qcow2 version {version}; 2 and 3 are known"),
        () if long(8) != 0 => {
            "it has a backing file; only images that stand alone are served: qemu-img convert -O qcow2 OLD NEW".into()
        }
        () if word(32) != 0 => format!("it is encrypted (method {}); qemu-img convert can take that away", word(32)),
        () if version == 3 && features & 1 != 0 => {
            "it was not closed properly and its reference counts may be wrong: qemu-img check -r all".into()
        }
        () if version == 3 && features & 2 != 0 => "it is marked as corrupt: qemu-img check".into(),
        () if version == 3 && features & 4 != 0 => {
            "its data are in another file; only images that stand alone are served: qemu-img convert -O qcow2 OLD NEW"
                .into()
        }
        () => return Ok(()),
    };
    Err(content(path, problem))
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn read(&self, offset: u64, data: &GuestBuffer) -> io::Result<()> {
        let (mut at, len) = (0, data.len());
        let mut bytes = vec![0; len.min(CHUNK) as usize];
        while at < len {
            let now = &mut bytes[..(len - at).min(CHUNK) as usize];
            self.access().read(&mut *now, offset + at)?;
            data.write(at, now);
            at += now.len() as u64;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &GuestBuffer) -> io::Result<()> {
        let (mut at, len) = (0, data.len());
        let mut bytes = vec![0; len.min(CHUNK) as usize];
        while at < len {
            let now = &mut bytes[..(len - at).min(CHUNK) as usize];
            data.read(at, now);
            self.access().write(&*now, offset + at)?;
            at += now.len() as u64;
        }
        self.access().flush()
    }

    fn flush(&self) -> io::Result<()> {
        let access = self.access();
        access.flush()?;
        access.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        match access.discard_to_any(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done.and_then(|()| access.flush()),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let done = if unmap {
            self.access.write().unwrap_or_else(PoisonError::into_inner).discard_to_zero(offset, len)
        } else {
            self.access().write_zeroes(offset, len)
        };
        match done {
            // Version 2 of the format has no clusters of zeroes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.fill_with_zeroes(offset, len)?,
            done => done?,
        }
        self.access().flush()
    }
}
