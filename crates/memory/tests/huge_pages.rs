//! Files on hugetlbfs, whose offsets and lengths go by their own page size.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd};

use viaduct_memory::{Mapping, MappingError, access};

const HUGE: u64 = 2 << 20;
const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

fn file(size: u64) -> io::Result<File> {
    // SAFETY: the name is a C string, and a descriptor that is returned is ours.
    let file = unsafe {
        let fd =
            libc::memfd_create(c"viaduct-huge".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size)?;
    Ok(file)
}

/// Maps a range in the middle of two huge pages, writes it through one mapping, reads it through another, cuts the
/// file.
fn exercise(file: &File) -> Result<(), MappingError> {
    let (offset, len) = (HUGE - 4096, 8192);
    let mapping = Mapping::new(file.as_fd(), offset, len)?;
    // SAFETY: inside the mapping.
    unsafe { access::copy(mapping.as_ptr().add(4090), b"across huge pages".as_ptr(), 17) };
    let whole = Mapping::new(file.as_fd(), 0, 2 * HUGE)?;
    // SAFETY: inside the mapping.
    let read = unsafe { access::read_bytes::<17>(whole.as_ptr().add(usize::try_from(HUGE).unwrap() - 6)) };
    assert_eq!(&read, b"across huge pages");
    assert!(matches!(
        Mapping::new(file.as_fd(), HUGE, HUGE + 1),
        Err(MappingError::FileTooShort { found, .. }) if found == 2 * HUGE
    ));
    file.set_len(HUGE).unwrap();
    // SAFETY: inside the mapping, which has no page there any more.
    assert_eq!(unsafe { access::read_bytes::<4>(mapping.as_ptr().add(5000)) }, [0; 4]);
    assert!(mapping.faulted() && !whole.faulted());
    Ok(())
}

/// With free huge pages it works; without, the mapping is refused.
#[test]
fn works_or_is_refused() {
    let result = file(2 * HUGE).map(|file| exercise(&file));
    match result {
        Ok(Ok(())) => {}
        Ok(Err(MappingError::System { call: "mmap", error, .. })) => {
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        }
        Ok(Err(other)) => panic!("{other}"),
        Err(error) => no_huge_pages(&error),
    }
}

/// Pages that are not there are missed when the file is mapped, not when a poller touches them.
#[test]
fn more_than_there_is_is_refused() {
    const MUCH: u64 = 1 << 40;
    match file(MUCH).map(|file| Mapping::new(file.as_fd(), 0, MUCH)) {
        Ok(Err(MappingError::System { call: "mmap", error, .. })) => {
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        }
        Ok(other) => panic!("{other:?}"),
        Err(error) => no_huge_pages(&error),
    }
}

/// A kernel without huge pages of 2 MiB refuses the file itself.
fn no_huge_pages(error: &io::Error) {
    let code = error.raw_os_error();
    assert!(matches!(code, Some(libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::ENOENT)), "{error}");
}

/// Reserves four pages and gives them back.
#[test]
#[ignore = "needs root: changes the number of huge pages while it runs"]
fn works_with_reserved_pages() {
    struct Restore(String);
    impl Drop for Restore {
        fn drop(&mut self) {
            std::fs::write(RESERVED, self.0.trim()).unwrap();
        }
    }
    let before = std::fs::read_to_string(RESERVED).unwrap();
    let wanted = before.trim().parse::<u64>().unwrap() + 4;
    let _restore = Restore(before);
    std::fs::write(RESERVED, wanted.to_string()).unwrap();
    exercise(&file(2 * HUGE).unwrap()).unwrap();
}
