//! A driver and a device in two threads, each asleep whenever there is nothing to do: every buffer arrives, with what was
//! written into it, and no wake-up is lost. A lost one shows as a wait that does not end.

mod rig;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rig::{DATA, Rig, config};
use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_ring::{Batch, DeviceQueue, DriverQueue, Layout, QueueConfig};

const BUFFERS: u64 = 100_000;
const PATIENCE: Duration = Duration::from_secs(60);

/// Sleeps until unparked; a thread that has been unparked before does not sleep. What a kick or a call is.
fn sleep(deadline: Instant, who: &str) {
    thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
    assert!(Instant::now() < deadline, "the {who} was not woken");
}

fn word(memory: &GuestMemory, addr: u64) -> *mut u64 {
    memory.translate(&mut RegionCache::default(), addr, 8).unwrap().as_ptr().cast()
}

/// The driver sends numbers, in one or two device-readable words, and expects each plus one in a device-writable word.
fn drive(mut queue: DriverQueue, device: &Thread, calls: &AtomicU64) {
    let memory = queue.memory().clone();
    let deadline = Instant::now() + PATIENCE;
    let mut places: VecDeque<u64> = (0..queue.size().into()).map(|i| DATA + 64 * i).collect();
    let mut sent_at = std::collections::HashMap::new();
    let (mut next, mut back) = (0u64, 0u64);
    while back < BUFFERS {
        // Bursts of different lengths, so that both sides run dry again and again.
        for _ in 0..1 + next % 40 {
            let Some(place) = places.front().copied().filter(|_| next < BUFFERS) else { break };
            let out = if next.is_multiple_of(3) { vec![(place, 8), (place + 8, 8)] } else { vec![(place, 8)] };
            // SAFETY: two words of a place that the device does not have.
            unsafe {
                word(&memory, place).write_volatile(next);
                word(&memory, place + 8).write_volatile(!next);
                word(&memory, place + 16).write_volatile(0);
            }
            if !queue.add(&out, &[(place + 16, 8)], next).unwrap() {
                break;
            }
            places.pop_front();
            sent_at.insert(next, place);
            next += 1;
        }
        if queue.publish() {
            device.unpark();
            calls.fetch_add(1, Ordering::Relaxed);
        }
        loop {
            let mut took = false;
            while let Some((token, written)) = queue.take().unwrap() {
                took = true;
                assert_eq!(written, 8);
                let place = sent_at.remove(&token).expect("outstanding");
                // SAFETY: a word of a buffer that came back.
                assert_eq!(unsafe { word(&memory, place + 16).read_volatile() }, token + 1);
                places.push_back(place);
                back += 1;
            }
            if took || back == BUFFERS {
                break;
            }
            if !queue.enable_notifications() {
                sleep(deadline, "driver");
            }
            queue.disable_notifications();
        }
    }
    assert!(sent_at.is_empty());
}

fn serve(mut queue: DeviceQueue, driver: &Thread, done: &AtomicBool) {
    let deadline = Instant::now() + PATIENCE;
    let mut batch = Batch::with_capacity(32);
    let mut expected = 0u64;
    while !done.load(Ordering::Acquire) {
        batch.clear();
        if queue.peek(&mut batch, 1 + (expected % 32) as usize).unwrap() == 0 {
            if !queue.enable_notifications() {
                sleep(deadline, "device");
            }
            queue.disable_notifications();
            continue;
        }
        queue.consume(&batch.chains);
        for chain in &batch.chains {
            let mut word = [0; 8];
            for (i, span) in batch.readable(chain).iter().enumerate() {
                // SAFETY: the queue keeps the memory.
                unsafe { span.read(0, &mut word) };
                assert_eq!(u64::from_le_bytes(word), if i == 0 { expected } else { !expected });
            }
            assert_eq!(chain.readable_len, if expected.is_multiple_of(3) { 16 } else { 8 });
            // SAFETY: the queue keeps the memory.
            unsafe { batch.writable(chain)[0].write(0, &(expected + 1).to_le_bytes()) };
            queue.complete(chain, 8);
            expected += 1;
        }
        if queue.publish() {
            driver.unpark();
        }
    }
    assert_eq!(expected, BUFFERS);
}

fn run(config: &QueueConfig) {
    let Rig { driver, device, memory: _memory } = Rig::new(config);
    let done = Arc::new(AtomicBool::new(false));
    let kicks = AtomicU64::new(0);
    let driver_thread = thread::current();
    let device_thread = thread::spawn({
        let done = done.clone();
        move || serve(device, &driver_thread, &done)
    });
    drive(driver, device_thread.thread(), &kicks);
    done.store(true, Ordering::Release);
    device_thread.thread().unpark();
    device_thread.join().unwrap();
    assert!(kicks.load(Ordering::Relaxed) > 0);
}

#[test]
fn split_with_flags() {
    run(&config(Layout::Split, 64));
}

#[test]
fn split_with_event_index() {
    run(&QueueConfig { event_idx: true, indirect: true, ..config(Layout::Split, 64) });
}

#[test]
fn a_small_split_ring() {
    run(&QueueConfig { event_idx: true, base: 65000, ..config(Layout::Split, 4) });
}

#[test]
fn packed_with_flags() {
    run(&config(Layout::Packed, 61));
}

#[test]
fn packed_with_event_index() {
    run(&QueueConfig { event_idx: true, indirect: true, ..config(Layout::Packed, 61) });
}

#[test]
fn a_small_packed_ring() {
    run(&QueueConfig { event_idx: true, ..config(Layout::Packed, 3) });
}
