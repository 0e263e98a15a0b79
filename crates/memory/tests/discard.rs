//! Pages given back: gone from the file, and nothing beside them touched.

use std::os::fd::{AsRawFd, OwnedFd};

use viaduct_memory::{GuestMemory, RegionCache, RegionSpec, Span, discard, memfd};

const PAGE: u64 = 4096;
const PAGES: u64 = 16;
/// The file has a page in front of the region, so that file offsets and guest addresses differ.
const OFFSET: u64 = PAGE;

fn filled() -> (GuestMemory, OwnedFd) {
    let file = memfd(OFFSET + PAGES * PAGE).unwrap();
    let region = RegionSpec { guest_addr: 0x10_0000, size: PAGES * PAGE, user_addr: 0x10_0000, mmap_offset: OFFSET };
    let memory = GuestMemory::new().with_region(region, file.try_clone().unwrap()).unwrap();
    // SAFETY: the memory lives on, and the span has as many bytes.
    unsafe { span(&memory, 0, PAGES * PAGE).write(0, &vec![0xaa; (PAGES * PAGE) as usize]) };
    (memory, file)
}

fn span(memory: &GuestMemory, offset: u64, len: u64) -> Span {
    memory.translate(&mut RegionCache::default(), 0x10_0000 + offset, len.try_into().unwrap()).unwrap()
}

fn blocks(file: &OwnedFd) -> i64 {
    // SAFETY: all-zero bytes are a valid structure, which the call fills.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        assert_eq!(libc::fstat(file.as_raw_fd(), &mut stat), 0);
        stat.st_blocks
    }
}

fn bytes(memory: &GuestMemory) -> Vec<u8> {
    let mut found = vec![0; (PAGES * PAGE) as usize];
    // SAFETY: the memory lives on, and the span has as many bytes.
    unsafe { span(memory, 0, PAGES * PAGE).read(0, &mut found) };
    found
}

#[test]
fn whole_pages_leave_the_file() {
    let (memory, file) = filled();
    let before = blocks(&file);
    // SAFETY: the memory lives on.
    assert_eq!(unsafe { discard(span(&memory, 2 * PAGE, 3 * PAGE)) }.unwrap(), 3 * PAGE);
    assert_eq!(before - blocks(&file), 3 * PAGE as i64 / 512);
    for (at, byte) in bytes(&memory).into_iter().enumerate() {
        assert_eq!(byte, if (2..5).contains(&(at as u64 / PAGE)) { 0 } else { 0xaa }, "byte {at:#x}");
    }
}

#[test]
fn parts_of_pages_stay() {
    let (memory, file) = filled();
    let before = blocks(&file);
    // SAFETY: the memory lives on.
    unsafe {
        assert_eq!(discard(span(&memory, 1, 2 * PAGE)).unwrap(), PAGE);
        assert_eq!(discard(span(&memory, 8 * PAGE + 1, PAGE)).unwrap(), 0);
        assert_eq!(discard(span(&memory, 8 * PAGE, PAGE - 1)).unwrap(), 0);
        assert_eq!(discard(span(&memory, 8 * PAGE + 7, 1)).unwrap(), 0);
    }
    assert_eq!(before - blocks(&file), PAGE as i64 / 512);
    let found = bytes(&memory);
    assert!(found[..PAGE as usize].iter().chain(&found[2 * PAGE as usize..]).all(|&byte| byte == 0xaa));
}

#[test]
fn what_was_given_back_can_be_written_again() {
    let (memory, _file) = filled();
    // SAFETY: the memory lives on, and the bytes lie inside the span.
    unsafe {
        let place = span(&memory, 0, PAGE);
        discard(place).unwrap();
        place.write(100, b"again");
    }
    assert_eq!(&bytes(&memory)[98..107], b"\0\0again\0\0");
    assert!(!memory.faulted());
}

#[test]
fn memory_of_no_file_reads_as_zeroes_again() {
    let region = RegionSpec { guest_addr: 0x10_0000, size: PAGES * PAGE, user_addr: 0x10_0000, mmap_offset: 0 };
    let memory = GuestMemory::new().with_anonymous_region(region).unwrap();
    // SAFETY: the memory lives on, and the spans have as many bytes.
    unsafe {
        span(&memory, 0, PAGES * PAGE).write(0, &vec![0xaa; (PAGES * PAGE) as usize]);
        assert_eq!(discard(span(&memory, 2 * PAGE - 1, 3 * PAGE + 1)).unwrap(), 3 * PAGE);
    }
    for (at, byte) in bytes(&memory).into_iter().enumerate() {
        assert_eq!(byte, if (2..5).contains(&(at as u64 / PAGE)) { 0 } else { 0xaa }, "byte {at:#x}");
    }
}
