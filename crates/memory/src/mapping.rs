//! One `mmap`: of a front-end's file, or of memory that nobody else shall see.
//!
//! # Theory of operation
//!
//! The front-end says "my memory from `guest_addr` lies in this file from `mmap_offset`, `size` bytes". The file is a
//! memfd, a file on tmpfs, or one on hugetlbfs with pages of any size, and the offset need not be a multiple of that
//! page size, so the offset is aligned down and the end aligned up to the file's own block size before `mmap`.
//!
//! A file that is too short is refused here; a file that is cut later is the fault guard's business ([`crate::fault`]),
//! with which every mapping is registered for as long as it lives. Files whose pages are made by another user's process
//! on demand (FUSE) are refused, because reading them can block a poller for as long as that process likes.
//!
//! The descriptor is closed as soon as the mapping exists: a hundred ports with hundreds of regions each would
//! otherwise hold tens of thousands of descriptors.
//!
//! This is plain `mmap` and not rust-vmm's `MmapRegion`: the guard replaces the pages under the mapping, the block size
//! of hugetlbfs decides its length, and nothing else of vm-memory would be used.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::fault::Registration;

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// A mapping needs at least one byte.
    #[error("a mapping of 0 bytes was asked for; it needs at least 1")]
    Empty,
    /// Offset and length do not fit the address space.
    #[error(
        "file range from offset {offset:#x}, {len:#x} bytes, does not fit into a process; it may end at {max:#x} at most"
    )]
    TooLarge {
        /// Offset asked for.
        offset: u64,
        /// Length asked for.
        len: u64,
        /// Largest end allowed.
        max: u64,
    },
    /// The file ends before the range does.
    #[error("the file has {found:#x} bytes but the range from offset {offset:#x} needs it to have {needed:#x}")]
    FileTooShort {
        /// Offset asked for.
        offset: u64,
        /// Length the file must have.
        needed: u64,
        /// Length the file has.
        found: u64,
    },
    /// The descriptor is not of a file whose pages the kernel itself keeps.
    #[error(
        "the file descriptor is of {found}; allowed are memfd and regular files on tmpfs, hugetlbfs or a local disk"
    )]
    FileKind {
        /// What it is instead.
        found: &'static str,
    },
    /// A system call failed.
    #[error("{call} failed for {len:#x} bytes from file offset {offset:#x}: {error}")]
    System {
        /// Name of the system call.
        call: &'static str,
        /// Offset asked for.
        offset: u64,
        /// Length asked for.
        len: u64,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// A mapping of a part of a file, shared unless it was made private, or of no file; readable and writable, unmapped when
/// dropped.
#[derive(Debug)]
pub struct Mapping {
    /// First byte of the range asked for; the pages may begin earlier.
    start: *mut u8,
    len: usize,
    /// The pages as mapped, aligned to the file's block size.
    pages: *mut u8,
    pages_len: usize,
    /// `None` only while dropping.
    registration: Option<Registration>,
}

// SAFETY: the mapping is plain shared memory that no thread owns; access goes through the rules of this crate.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`, which may be any number.
    ///
    /// # Errors
    /// [`MappingError`]: an empty or impossible range, a file too short or of a kind that is not allowed, or no memory.
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Mapping, MappingError> {
        Mapping::with_flags(file, offset, len, libc::MAP_SHARED)
    }

    /// The same for a file that only gives the first content: it is read page by page as these are touched, and what is
    /// written stays in this process. The file may be open for reading only.
    ///
    /// # Errors
    /// As for [`new`](Mapping::new).
    pub fn private(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Mapping, MappingError> {
        Mapping::with_flags(file, offset, len, libc::MAP_PRIVATE)
    }

    /// `len` bytes of zeroes that are this process's own, in huge pages where the system has them: those of a file in memory are
    /// small on most systems, and a guest that touches a small page for the first time leaves its processor for it.
    ///
    /// # Errors
    /// [`MappingError`]: an empty or impossible range, or no memory.
    pub fn anonymous(len: u64) -> Result<Mapping, MappingError> {
        if len == 0 {
            return Err(MappingError::Empty);
        }
        let error = |call| MappingError::System { call, offset: 0, len, error: io::Error::last_os_error() };
        // SAFETY: no memory is involved.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let max = isize::MAX as u64;
        let too_large = || MappingError::TooLarge { offset: 0, len, max };
        let pages_len = len.checked_next_multiple_of(page).filter(|len| *len <= max - HUGE_PAGE as u64);
        let pages_len = usize::try_from(pages_len.ok_or_else(too_large)?).map_err(|_| too_large())?;
        // With room to begin at a huge page: one of the guest's can be one of ours only where both begin at the same place.
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at a place the kernel chooses touches no memory that exists already.
        let room = unsafe { libc::mmap(std::ptr::null_mut(), pages_len + HUGE_PAGE, protection, flags, -1, 0) };
        if room == libc::MAP_FAILED {
            return Err(error("mmap"));
        }
        let room = room.cast::<u8>();
        let before = room.align_offset(HUGE_PAGE).min(HUGE_PAGE);
        let pages = room.wrapping_add(before);
        // SAFETY: both ranges lie in the mapping just made, before and behind what is kept of it. The advice changes no content.
        unsafe {
            if before > 0 {
                libc::munmap(room.cast(), before);
            }
            if before < HUGE_PAGE {
                libc::munmap(pages.wrapping_add(pages_len).cast(), HUGE_PAGE - before);
            }
            libc::madvise(pages.cast(), pages_len, libc::MADV_DONTDUMP);
            libc::madvise(pages.cast(), pages_len, libc::MADV_HUGEPAGE);
        }
        let registration = Some(Registration::new(pages as usize, pages_len));
        // At most `pages_len`, which fits.
        Ok(Mapping { start: pages, len: len as usize, pages, pages_len, registration })
    }

    fn with_flags(file: BorrowedFd<'_>, offset: u64, len: u64, flags: c_int) -> Result<Mapping, MappingError> {
        if len == 0 {
            return Err(MappingError::Empty);
        }
        let max = isize::MAX as u64;
        let end = offset.checked_add(len).filter(|end| *end <= max);
        let end = end.ok_or(MappingError::TooLarge { offset, len, max })?;
        let kind = FileKind::of(file).map_err(|(call, error)| MappingError::System { call, offset, len, error })?;
        if let Some(found) = kind.refused {
            return Err(MappingError::FileKind { found });
        }
        if kind.size < end {
            return Err(MappingError::FileTooShort { offset, needed: end, found: kind.size });
        }
        let first = offset & !(kind.block - 1);
        // `end` is at most isize::MAX and a block far smaller, so this cannot overflow.
        let pages_len = ((end + kind.block - 1) & !(kind.block - 1)) - first;
        let (Ok(pages_len), Ok(skipped), Ok(len_here), Ok(first_here)) = (
            usize::try_from(pages_len),
            usize::try_from(offset - first),
            usize::try_from(len),
            libc::off_t::try_from(first),
        ) else {
            return Err(MappingError::TooLarge { offset, len, max });
        };
        // SAFETY: a new mapping at a place the kernel chooses touches no memory that exists already.
        let pages = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages_len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                file.as_raw_fd(),
                first_here,
            )
        };
        if pages == libc::MAP_FAILED {
            return Err(MappingError::System { call: "mmap", offset, len, error: io::Error::last_os_error() });
        }
        // Advice: the guest's memory has no place in our core dumps, and huge pages cost fewer TLB misses. A kernel
        // that cannot follow it refuses, and nothing is lost. SAFETY: the range is the mapping just made, and neither
        // piece of advice changes its contents.
        unsafe {
            libc::madvise(pages, pages_len, libc::MADV_DONTDUMP);
            if kind.shmem {
                libc::madvise(pages, pages_len, libc::MADV_HUGEPAGE);
            }
        }
        let pages = pages.cast::<u8>();
        let registration = Some(Registration::new(pages as usize, pages_len));
        Ok(Mapping { start: pages.wrapping_add(skipped), len: len_here, pages, pages_len, registration })
    }

    /// Address of the first byte in this process.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// Length in bytes, as asked for.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: a mapping has at least one byte.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether an access has faulted: the pages are gone and it reads as zeroes since then.
    #[inline]
    pub fn faulted(&self) -> bool {
        self.registration.as_ref().is_some_and(Registration::faulted)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First out of the guard's table, then unmapped: else another mapping could take the place in between and the
        // guard would know two owners for one address.
        self.registration = None;
        // SAFETY: the pages are ours, and nobody can use them any more: whoever touches a span keeps its mapping alive.
        let done = unsafe { libc::munmap(self.pages.cast(), self.pages_len) };
        debug_assert_eq!(done, 0, "munmap: {}", io::Error::last_os_error());
    }
}

/// The size of x86's second-smallest pages.
const HUGE_PAGE: usize = 2 << 20;

/// What `fstat` and `fstatfs` say about a file.
struct FileKind {
    size: u64,
    /// Unit of offsets and lengths for `mmap`: a power of two.
    block: u64,
    shmem: bool,
    refused: Option<&'static str>,
}

impl FileKind {
    fn of(file: BorrowedFd<'_>) -> Result<FileKind, (&'static str, io::Error)> {
        // SAFETY: both structures are plain data for which all-zero bytes are valid, and the calls fill them.
        let (stat, statfs) = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            let mut statfs: libc::statfs = std::mem::zeroed();
            if libc::fstat(file.as_raw_fd(), &mut stat) != 0 {
                return Err(("fstat", io::Error::last_os_error()));
            }
            if libc::fstatfs(file.as_raw_fd(), &mut statfs) != 0 {
                return Err(("fstatfs", io::Error::last_os_error()));
            }
            (stat, statfs)
        };
        // The magic numbers are 32 bits wide but the field's type differs between architectures.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let system = statfs.f_type as u32;
        let refused = match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG if system == FUSE_MAGIC => Some("a FUSE file system, whose pages another process makes"),
            libc::S_IFREG => None,
            libc::S_IFDIR => Some("a directory"),
            libc::S_IFCHR | libc::S_IFBLK => Some("a device"),
            libc::S_IFSOCK => Some("a socket"),
            libc::S_IFIFO => Some("a pipe"),
            _ => Some("no file (an eventfd or the like)"),
        };
        // SAFETY: no memory is involved.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let block = if system == HUGETLBFS_MAGIC { u64::try_from(statfs.f_bsize).unwrap_or(page) } else { page };
        Ok(FileKind {
            size: u64::try_from(stat.st_size).unwrap_or(0),
            block: if block.is_power_of_two() { block.max(page) } else { page },
            shmem: system == TMPFS_MAGIC,
            refused,
        })
    }
}

// From linux/magic.h; libc has them with types that differ between architectures.
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;
const TMPFS_MAGIC: u32 = 0x0102_1994;
const FUSE_MAGIC: u32 = 0x6573_5546;

/// An anonymous file in memory of `size` bytes to share with a back-end. It is sealed against being cut or grown, so
/// that neither side can be hurt by it.
///
/// # Errors
/// Whatever `memfd_create`, `ftruncate` or `fcntl` answer.
pub fn memfd(size: u64) -> io::Result<OwnedFd> {
    let file = unsealed_memfd(size, 0)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no memory is involved.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// A memfd that may be cut and grown, with more flags for `memfd_create` (`MFD_HUGETLB`).
pub(crate) fn unsealed_memfd(size: u64, flags: u32) -> io::Result<OwnedFd> {
    let size = libc::off_t::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: the name is a C string; a descriptor that is returned is ours alone.
    let file = unsafe {
        let fd: c_int =
            libc::memfd_create(c"viaduct-memory".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: no memory is involved.
    if unsafe { libc::ftruncate(file.as_raw_fd(), size) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
