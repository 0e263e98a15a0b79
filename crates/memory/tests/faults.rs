//! A file that loses its pages while it is mapped: the guard turns the fault into zeroes and a mark.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use viaduct_memory::iotlb::{Access, Iotlb, Translation};
use viaduct_memory::{GuestMemory, RegionCache, RegionSpec, access, fault};

const PAGE: u64 = 4096;

/// A memfd that nothing seals.
fn file(size: u64, flags: u32) -> std::io::Result<File> {
    // SAFETY: the name is a C string, and the descriptor is ours.
    let file = unsafe {
        let fd = libc::memfd_create(c"viaduct-test".as_ptr(), libc::MFD_CLOEXEC | flags);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size)?;
    Ok(file)
}

fn shared(file: &File) -> OwnedFd {
    file.as_fd().try_clone_to_owned().unwrap()
}

fn region(guest_addr: u64, size: u64) -> RegionSpec {
    RegionSpec { guest_addr, size, user_addr: guest_addr + (1 << 40), mmap_offset: 0 }
}

fn read(memory: &GuestMemory, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xAA; len];
    let span = memory.translate(&mut RegionCache::default(), addr, u32::try_from(len).unwrap()).unwrap();
    // SAFETY: `memory` is alive.
    unsafe { span.read(0, &mut bytes) };
    bytes
}

fn write(memory: &GuestMemory, addr: u64, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).unwrap();
    let span = memory.translate(&mut RegionCache::default(), addr, len).unwrap();
    // SAFETY: `memory` is alive.
    unsafe { span.write(0, bytes) };
}

#[test]
fn truncated_file_reads_as_zeroes_and_is_marked() {
    let (bad, good) = (file(16 * PAGE, 0).unwrap(), file(16 * PAGE, 0).unwrap());
    let memory = GuestMemory::new().with_region(region(0, 16 * PAGE), shared(&bad)).unwrap();
    let other = GuestMemory::new().with_region(region(0, 16 * PAGE), shared(&good)).unwrap();
    write(&memory, 8 * PAGE, b"guest");
    write(&other, 8 * PAGE, b"other");
    assert_eq!(read(&memory, 8 * PAGE, 5), b"guest");
    let before = fault::count();
    bad.set_len(PAGE).unwrap();
    assert!(!memory.faulted());
    assert_eq!(read(&memory, 8 * PAGE, 5), [0; 5]);
    assert!(memory.faulted());
    assert!(fault::count() > before);
    // The mapping works on, without the file.
    write(&memory, 8 * PAGE, b"again");
    assert_eq!(read(&memory, 8 * PAGE, 5), b"again");
    // Somebody else's memory is as it was.
    assert!(!other.faulted());
    assert_eq!(read(&other, 8 * PAGE, 5), b"other");
    // A new region in the same place is not marked by the old one's fault.
    drop(memory);
    let fresh = GuestMemory::new().with_region(region(0, 16 * PAGE), shared(&good)).unwrap();
    assert!(!fresh.faulted());
}

#[test]
fn a_ring_in_pieces_sees_that_its_file_was_cut() {
    let file = file(4 * PAGE, 0).unwrap();
    let plain = GuestMemory::new().with_region(region(0, 4 * PAGE), shared(&file)).unwrap();
    write(&plain, 3 * PAGE, b"first");
    write(&plain, PAGE, b"second");
    let signal = File::options().write(true).open("/dev/null").unwrap().into();
    let iotlb = Arc::new(Iotlb::new(signal));
    // Two pages that follow each other for the driver, and lie the other way round.
    for (iova, page) in [(0, 3), (PAGE, 1)] {
        iotlb.update(Translation::new(iova, PAGE, (1 << 40) + page * PAGE, 3).unwrap());
    }
    let memory = plain.behind(iotlb);
    let part = memory.ring_part(0, 2 * PAGE as u32, &[Access::Read, Access::Write]).unwrap();
    assert!(part.is_mapped_anew() && !part.faulted());
    let byte = |at: u64| {
        // SAFETY: `part` has two pages.
        unsafe { access::read_bytes::<1>(part.as_ptr().add(at as usize))[0] }
    };
    assert_eq!([byte(0), byte(PAGE)], [b'f', b's']);
    file.set_len(2 * PAGE).unwrap();
    assert_eq!([byte(0), byte(PAGE)], [0, 0], "one of its pages is gone, so it goes on without the file");
    assert!(part.faulted());
    assert!(!memory.faulted(), "nobody has touched what else of it is mapped");
}

#[test]
fn a_file_that_is_sealed_against_writes_is_refused() {
    let file = file(4 * PAGE, libc::MFD_ALLOW_SEALING).unwrap();
    // SAFETY: a plain fcntl call.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }, 0);
    let error = GuestMemory::new().with_region(region(0, 4 * PAGE), shared(&file)).expect_err("it cannot be written");
    assert!(error.to_string().contains("Operation not permitted"), "{error}");
}

#[test]
fn write_to_a_truncated_file_is_caught() {
    let file = file(4 * PAGE, 0).unwrap();
    let memory = GuestMemory::new().with_region(region(0, 4 * PAGE), shared(&file)).unwrap();
    file.set_len(0).unwrap();
    write(&memory, 3 * PAGE - 2, b"across pages");
    assert!(memory.faulted());
    assert_eq!(read(&memory, 3 * PAGE - 2, 12), b"across pages");
}

#[test]
fn hole_is_not_a_fault() {
    let file = file(4 * PAGE, 0).unwrap();
    let memory = GuestMemory::new().with_region(region(0, 4 * PAGE), shared(&file)).unwrap();
    assert_eq!(read(&memory, 2 * PAGE, 64), [0; 64]);
    write(&memory, PAGE, b"x");
    assert!(!memory.faulted());
}

/// Several threads copy in and out while the file is cut, over and over, and other mappings come and go.
#[test]
fn many_threads_fault_while_mappings_come_and_go() {
    const REGIONS: u64 = 40;
    for round in 0..20 {
        let files: Vec<File> = (0..REGIONS).map(|_| file(4 * PAGE, 0).unwrap()).collect();
        let mut memory = GuestMemory::new();
        for (index, file) in (0..).zip(&files) {
            memory = memory.with_region(region(index * 4 * PAGE, 4 * PAGE), shared(file)).unwrap();
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4u8)
                .map(|worker| {
                    let (memory, stop) = (&memory, &stop);
                    scope.spawn(move || {
                        // At least one pass over everything after the cut, so that every region must have faulted.
                        loop {
                            let last = stop.load(Ordering::Acquire);
                            for page in 0..REGIONS * 4 {
                                write(memory, page * PAGE + 100, &[worker; 1500]);
                                read(memory, page * PAGE + 60, 1600);
                            }
                            if last {
                                break;
                            }
                        }
                    })
                })
                .collect();
            for file in &files {
                let passing = GuestMemory::allocate(PAGE).unwrap();
                file.set_len(if round % 2 == 0 { 0 } else { PAGE }).unwrap();
                drop(passing);
            }
            stop.store(true, Ordering::Release);
            for worker in workers {
                worker.join().unwrap();
            }
        });
        assert!(memory.faulted());
        let marked = format!("{memory:?}").matches("faulted").count();
        assert_eq!(marked as u64, REGIONS);
    }
}
