//! The log of written pages: a bit for each page that is marked, none for others, and nothing outside.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use proptest::prelude::*;
use viaduct_memory::{Call, DirtyLog, GuestMemory, Mapping, MemoryError, RegionCache, RegionSpec, access, memfd};

const PAGE: u64 = DirtyLog::PAGE;
/// The log lies between two stretches that are not its own, and begins at no page of the file.
const OFFSET: u64 = 4096 + 5;
const AROUND: u64 = 4096;

struct Bitmap {
    log: DirtyLog,
    whole: Mapping,
    size: u64,
}

impl Bitmap {
    fn new(size: u64) -> Bitmap {
        let file = memfd(OFFSET + size + AROUND).unwrap();
        let log = DirtyLog::new(file.as_fd(), OFFSET, size).unwrap();
        let whole = Mapping::new(file.as_fd(), 0, OFFSET + size + AROUND).unwrap();
        Bitmap { log, whole, size }
    }

    fn byte(&self, at: u64) -> u8 {
        // SAFETY: within the mapping.
        let [byte] = unsafe { access::read_bytes(self.whole.as_ptr().add(at as usize)) };
        byte
    }

    /// The pages marked; checks that nothing around the log was touched.
    fn pages(&self) -> BTreeSet<u64> {
        let around = (0..OFFSET).chain(OFFSET + self.size..OFFSET + self.size + AROUND);
        assert!(around.into_iter().all(|at| self.byte(at) == 0), "written outside the log");
        (0..8 * self.size).filter(|page| self.byte(OFFSET + page / 8) >> (page % 8) & 1 == 1).collect()
    }
}

fn event_fd() -> Call {
    // SAFETY: a fresh descriptor, taken over at once.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) };
    Call::new(fd).expect("an eventfd")
}

/// Ranges near everything that matters: pages, bytes of the log, its end, the last address.
fn ranges() -> impl Strategy<Value = (u64, u64)> {
    let near = |at: u64| (0..=2 * PAGE).prop_map(move |by| at.wrapping_add(by).wrapping_sub(PAGE));
    let start = prop_oneof![0..200 * PAGE, near(8 * PAGE), near(104 * PAGE), near(0), any::<u64>()];
    let len = prop_oneof![0..3u64, 0..5 * PAGE, 0..300 * PAGE, any::<u64>()];
    (start, len)
}

proptest! {
    #[test]
    fn marks_the_pages_of_each_range_and_no_others(ranges in prop::collection::vec(ranges(), 1..20), event: bool) {
        // 104 pages: a number of bytes that is no whole word.
        let bitmap = Bitmap::new(13);
        let log = if event { bitmap.log.with_event(event_fd()) } else { bitmap.log.clone() };
        let mut expected = BTreeSet::new();
        for (addr, len) in ranges {
            log.mark(addr, len);
            let end = u128::from(addr) + u128::from(len);
            expected.extend((0..104u64).filter(|page| {
                let start = u128::from(page * PAGE);
                len > 0 && u128::from(addr) < start + u128::from(PAGE) && start < end
            }));
            prop_assert_eq!(log.covers(addr, len), end <= 104 * u128::from(PAGE));
            prop_assert_eq!(bitmap.pages(), expected.clone());
        }
    }
}

fn spec(guest_addr: u64, size: u64) -> RegionSpec {
    RegionSpec { guest_addr, size, user_addr: guest_addr, mmap_offset: 0 }
}

#[test]
fn what_is_written_through_any_region_is_marked_where_the_guest_has_it() {
    let regions = [(0, 4 * PAGE), (10 * PAGE, 2 * PAGE), (64 * PAGE, 16 * PAGE)];
    let memory = regions.iter().fold(GuestMemory::new(), |memory, &(addr, size)| {
        memory.with_region(spec(addr, size), memfd(size).unwrap()).unwrap()
    });
    let bitmap = Bitmap::new(10);
    let logged = memory.with_log(Some(bitmap.log.clone())).unwrap();
    let mut expected = BTreeSet::new();
    for (addr, len, written, pages) in [
        (3 * PAGE + 4095, 1, 1, 3..=3),
        (11 * PAGE - 1, 2, 2, 10..=11),
        (70 * PAGE, 3 * 4096, 4097, 70..=71),
        (79 * PAGE, 4096, 4096, 79..=79),
    ] {
        // Translations of either table are the same.
        let span = memory.translate(&mut RegionCache::default(), addr, len).unwrap();
        memory.mark_written(span, written);
        assert_eq!(bitmap.pages(), expected, "a memory without a log marks nothing");
        logged.mark_written(span, written);
        expected.extend(pages);
        assert_eq!(bitmap.pages(), expected);
        assert_eq!(logged.logged_addr(span.as_ptr()), Some(addr));
    }
    let span = memory.translate(&mut RegionCache::default(), 0, 4096).unwrap();
    logged.mark_written(span, 0);
    assert_eq!(bitmap.pages(), expected, "no bytes, no page");
    let place = 0u8;
    assert_eq!(logged.logged_addr(&place), None, "not the guest's");
    assert!(logged.with_log(None).unwrap().log().is_none());
}

#[test]
fn a_log_that_does_not_cover_the_memory_is_refused() {
    let memory = GuestMemory::allocate(80 * PAGE).unwrap();
    assert!(memory.with_log(Some(Bitmap::new(10).log)).is_ok());
    let error = memory.with_log(Some(Bitmap::new(9).log)).err().unwrap();
    assert!(matches!(error, MemoryError::NotLogged { end: 0x48000, .. }), "{error}");
    // The last page there is.
    let top = GuestMemory::new().with_region(spec(0u64.wrapping_sub(PAGE), PAGE), memfd(PAGE).unwrap()).unwrap();
    assert!(top.with_log(Some(Bitmap::new(10).log)).is_err());
}

#[test]
fn a_log_that_is_cut_counts_as_a_fault_of_the_memory() {
    // SAFETY: a fresh descriptor, taken over at once; its length is set before it is used.
    let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"log".as_ptr(), libc::MFD_CLOEXEC)) };
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), 4096) }, 0);
    let log = DirtyLog::new(file.as_fd(), 0, 4096).unwrap();
    let memory = GuestMemory::allocate(PAGE).unwrap();
    let logged = memory.with_log(Some(log.clone())).unwrap();
    // SAFETY: no memory is involved but the mapping, which is guarded.
    assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), 0) }, 0);
    assert!(!logged.faulted());
    log.mark(0, 1);
    assert!(log.faulted() && logged.faulted() && !memory.faulted());
}

#[test]
fn marks_of_several_threads_are_all_there() {
    let bitmap = Bitmap::new(512);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let log = &bitmap.log;
            scope.spawn(move || (thread..4096).step_by(4).for_each(|page| log.mark(page * PAGE, 1)));
        }
    });
    assert_eq!(bitmap.pages(), (0..4096).collect());
}
