//! What can be mapped and what cannot.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use viaduct_memory::{Mapping, MappingError, access, memfd};

fn pattern(file: &OwnedFd, at: u64, bytes: &[u8]) {
    let mut file = File::from(file.try_clone().unwrap());
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
}

#[test]
fn any_offset_and_length() {
    let file = memfd(5 * 4096).unwrap();
    for (offset, len) in [(0, 1), (1, 1), (4095, 2), (4096, 4096), (5000, 9000), (5 * 4096 - 1, 1), (0, 5 * 4096)] {
        pattern(&file, offset, &[0x5A]);
        let mapping = Mapping::new(file.as_fd(), offset, len).unwrap();
        assert_eq!(mapping.len() as u64, len);
        // SAFETY: the mapping has at least one byte.
        assert_eq!(unsafe { access::read_bytes::<1>(mapping.as_ptr()) }, [0x5A], "{offset} {len}");
        // SAFETY: as above.
        unsafe { access::copy(mapping.as_ptr().add(mapping.len() - 1), [0xA5].as_ptr(), 1) };
        let again = Mapping::new(file.as_fd(), offset + len - 1, 1).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { access::read_bytes::<1>(again.as_ptr()) }, [0xA5]);
    }
}

#[test]
fn impossible_ranges() {
    let file = memfd(4096).unwrap();
    let refused = |offset, len| Mapping::new(file.as_fd(), offset, len).unwrap_err();
    assert!(matches!(refused(0, 0), MappingError::Empty));
    assert!(matches!(refused(0, 4097), MappingError::FileTooShort { needed: 4097, found: 4096, .. }));
    assert!(matches!(refused(4096, 1), MappingError::FileTooShort { needed: 4097, found: 4096, .. }));
    assert!(matches!(refused(u64::MAX, 2), MappingError::TooLarge { .. }));
    assert!(matches!(refused(1, u64::MAX), MappingError::TooLarge { .. }));
    assert!(matches!(refused(0, 1 << 63), MappingError::TooLarge { .. }));
}

#[test]
fn things_that_are_not_memory() {
    let refused = |file: OwnedFd| match Mapping::new(file.as_fd(), 0, 4096).unwrap_err() {
        MappingError::FileKind { found } => found,
        other => panic!("{other}"),
    };
    assert_eq!(refused(File::open("/dev/zero").unwrap().into()), "a device");
    assert_eq!(refused(File::open("/").unwrap().into()), "a directory");
    assert_eq!(refused(std::os::unix::net::UnixStream::pair().unwrap().0.into()), "a socket");
    // SAFETY: a descriptor that is returned is ours alone.
    let event = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
    assert!(refused(event).contains("eventfd"));
    // A file that was opened for reading only cannot be a guest's memory.
    let binary = File::open("/proc/self/exe").unwrap();
    assert!(matches!(Mapping::new(binary.as_fd(), 0, 64), Err(MappingError::System { call: "mmap", .. })));
}

#[test]
fn memfd_cannot_be_cut() {
    let file = File::from(memfd(8192).unwrap());
    assert_eq!(file.metadata().unwrap().len(), 8192);
    assert!(file.set_len(4096).is_err());
    assert!(file.set_len(16384).is_err());
}

#[test]
fn memory_of_no_file_is_zeroes_and_begins_at_a_huge_page() {
    for len in [1, 4096, 4097, (2 << 20) + 1] {
        let mapping = Mapping::anonymous(len).unwrap();
        assert_eq!(mapping.len() as u64, len);
        assert_eq!(mapping.as_ptr().addr() % (2 << 20), 0);
        let last = mapping.as_ptr().wrapping_add(mapping.len() - 1);
        // SAFETY: the mapping has at least one byte.
        unsafe {
            assert_eq!(access::read_bytes::<1>(last), [0]);
            access::copy(last, [0xA5].as_ptr(), 1);
            assert_eq!(access::read_bytes::<1>(last), [0xA5]);
        }
    }
    assert!(matches!(Mapping::anonymous(0).unwrap_err(), MappingError::Empty));
    for len in [u64::MAX, isize::MAX as u64] {
        assert!(matches!(Mapping::anonymous(len).unwrap_err(), MappingError::TooLarge { .. }), "{len:#x}");
    }
}
