//! The memory orderings of the engine, in all interleavings and with all reorderings that the memory model allows.
//!
//! `loom` cannot look through raw pointers into a mapping, so these are models: the same steps with the same orderings as
//! in `device/` and `driver/`, two buffers long. What is not atomic in them, the contents of buffers and descriptors, is
//! in cells that report every access that is not ordered. Weakening any ordering here, or leaving out a fence, fails; the
//! tests at the end make sure of the fence.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;

/// Buffers that pass.
const BUFFERS: u32 = 2;
/// No notification is wanted yet: an event index that is not passed.
const NEVER: u32 = u32::MAX;

/// One direction of a queue: what one side publishes and the other consumes. Split: available or used ring.
struct Split {
    buffers: [UnsafeCell<u32>; BUFFERS as usize],
    index: AtomicU32,
    /// `avail_event` or `used_event`: the consumer wants to hear of the entry with this index.
    event: AtomicU32,
}

/// The same in a packed ring: the second words of descriptors, 0 until they are marked.
struct Packed {
    buffers: [UnsafeCell<u32>; BUFFERS as usize],
    words: [AtomicU64; BUFFERS as usize],
    event: AtomicU32,
}

fn write(cell: &UnsafeCell<u32>, value: u32) {
    // SAFETY: loom checks that no other access is concurrent.
    cell.with_mut(|place| unsafe { *place = value });
}

fn read(cell: &UnsafeCell<u32>) -> u32 {
    // SAFETY: as above.
    cell.with(|place| unsafe { *place })
}

fn full_fence(present: bool) {
    if present {
        fence(Ordering::SeqCst);
    }
}

/// The producer publishes one buffer at a time and says which publications it announced, as bits; the consumer takes what
/// there is, arms, looks again, and sleeps. Asleep with something unread it must have been notified.
fn split(fences: bool) {
    let queue = Arc::new(Split {
        buffers: [UnsafeCell::new(0), UnsafeCell::new(0)],
        index: AtomicU32::new(0),
        event: AtomicU32::new(NEVER),
    });
    let producer = thread::spawn({
        let queue = queue.clone();
        move || {
            let mut announced = 0;
            for i in 0..BUFFERS {
                write(&queue.buffers[i as usize], i + 100);
                queue.index.store(i + 1, Ordering::Release);
                full_fence(fences);
                if queue.event.load(Ordering::Relaxed) == i {
                    announced |= 1 << i;
                }
            }
            announced
        }
    });
    let mut taken = 0;
    loop {
        let index = queue.index.load(Ordering::Acquire);
        while taken < index {
            assert_eq!(read(&queue.buffers[taken as usize]), taken + 100);
            taken += 1;
        }
        queue.event.store(taken, Ordering::Relaxed);
        full_fence(fences);
        if queue.index.load(Ordering::Acquire) == taken {
            break;
        }
    }
    let announced = producer.join().unwrap();
    assert!(taken == BUFFERS || announced & 1 << taken != 0, "asleep at {taken}, announced {announced:#b}");
}

/// The producer publishes both at once: the second word first, the first one last, with release.
fn packed(fences: bool) {
    let queue = Arc::new(Packed {
        buffers: [UnsafeCell::new(0), UnsafeCell::new(0)],
        words: [AtomicU64::new(0), AtomicU64::new(0)],
        event: AtomicU32::new(NEVER),
    });
    let producer = thread::spawn({
        let queue = queue.clone();
        move || {
            for (i, buffer) in queue.buffers.iter().enumerate() {
                write(buffer, i as u32 + 100);
            }
            queue.words[1].store(1, Ordering::Relaxed);
            queue.words[0].store(1, Ordering::Release);
            full_fence(fences);
            // Anything from the first to the last of the batch.
            queue.event.load(Ordering::Relaxed) < BUFFERS
        }
    });
    let mut taken = 0;
    loop {
        while taken < BUFFERS && queue.words[taken as usize].load(Ordering::Acquire) == 1 {
            assert_eq!(read(&queue.buffers[taken as usize]), taken + 100);
            taken += 1;
        }
        if taken == BUFFERS {
            break;
        }
        assert_eq!(taken, 0, "the second is marked when the first is");
        queue.event.store(taken, Ordering::Relaxed);
        full_fence(fences);
        if queue.words[taken as usize].load(Ordering::Acquire) == 0 {
            break;
        }
    }
    let announced = producer.join().unwrap();
    assert!(taken == BUFFERS || announced, "asleep at {taken}");
}

/// A buffer goes to the device and comes back: what each side writes, the other sees, and the place is used again.
fn there_and_back() {
    let there = Arc::new((UnsafeCell::new(0), AtomicU64::new(0)));
    let device = thread::spawn({
        let there = there.clone();
        move || {
            let (buffer, word) = &*there;
            for lap in [1, 3] {
                if word.load(Ordering::Acquire) != lap {
                    return;
                }
                assert_eq!(read(buffer), lap as u32);
                write(buffer, lap as u32 + 1);
                // Used: the same word.
                word.store(lap + 1, Ordering::Release);
            }
        }
    });
    let (buffer, word) = &*there;
    write(buffer, 1);
    word.store(1, Ordering::Release);
    if word.load(Ordering::Acquire) == 2 {
        assert_eq!(read(buffer), 2);
        write(buffer, 3);
        word.store(3, Ordering::Release);
    }
    device.join().unwrap();
}

#[test]
fn a_split_ring_orders_buffers_and_loses_no_wake_up() {
    loom::model(|| split(true));
}

#[test]
fn a_packed_ring_orders_buffers_and_loses_no_wake_up() {
    loom::model(|| packed(true));
}

#[test]
fn a_descriptor_that_goes_round_orders_its_buffer() {
    loom::model(there_and_back);
}

#[test]
#[should_panic(expected = "asleep at")]
fn without_the_fence_a_split_ring_loses_a_wake_up() {
    loom::model(|| split(false));
}

#[test]
#[should_panic(expected = "asleep at")]
fn without_the_fence_a_packed_ring_loses_a_wake_up() {
    loom::model(|| packed(false));
}
