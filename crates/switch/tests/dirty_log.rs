//! A live migration as a front-end carries it out: copy the memory while frames flow, then again and again what the log says
//! was written since, then stop the queues and copy the rest. The copy must be what is there.

mod station;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use station::{BROADCAST, MEMORY, Options, Station, frame, mac, stats, switch, until};
use viaduct_memory::{DirtyLog, Mapping, memfd};
use viaduct_ring::Layout;

const PAGE: usize = DirtyLog::PAGE as usize;
/// The descriptors and the available ring of the receive queue.
const DRIVER_PAGES: std::ops::Range<usize> = 0..0x30000 / PAGE;
const ROUNDS: usize = 200;
const PAGES: usize = MEMORY as usize / PAGE;

/// The front-end's side of a log.
struct Log {
    log: DirtyLog,
    words: Mapping,
}

impl Log {
    fn new() -> Log {
        let file = memfd((PAGES / 8) as u64).expect("memory");
        let log = DirtyLog::new(file.as_fd(), 0, (PAGES / 8) as u64).expect("it has this length");
        Log { log, words: Mapping::new(file.as_fd(), 0, (PAGES / 8) as u64).expect("it has this length") }
    }

    /// Takes the bits as QEMU does: word by word, each in one step.
    fn take(&self) -> Vec<usize> {
        let mut pages = Vec::new();
        for index in 0..PAGES / 64 {
            // SAFETY: within the mapping, aligned to 8 as its start is to a page.
            let word = unsafe { AtomicU64::from_ptr(self.words.as_ptr().cast::<u64>().add(index)) };
            let bits = u64::from_le(word.swap(0, Ordering::SeqCst));
            pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| 64 * index + bit));
        }
        pages
    }
}

fn copy_pages(station: &Station, copy: &mut [u8], pages: impl IntoIterator<Item = usize>) {
    for page in pages {
        let bytes = station.read((page * PAGE) as u64, PAGE);
        copy[page * PAGE..][..PAGE].copy_from_slice(&bytes);
    }
}

/// Sends until told to stop; the frames grow and shrink, so that they take one buffer or several.
fn send_until(sender: &mut Station, stop: &AtomicBool) -> u64 {
    let mut sent = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let len = 60 + (sent as usize * 397) % 8000;
        sender.send(&frame(mac(1), mac(2), len, sent as u8));
        sender.reclaim();
        sent += 1;
    }
    sent
}

fn migrate(layout: Layout, mergeable: bool) {
    let switch = switch(1);
    let buffer = if mergeable { 1024 } else { 16384 };
    let receiver_options = Options { layout, mergeable, buffers: 64, buffer, ..Options::default() };
    let mut sender = Station::plug(&switch, Options::default());
    let mut receiver = Station::plug(&switch, receiver_options);
    receiver.send(&frame(BROADCAST, mac(1), 60, 0));
    sender.receive().expect("the announcement");
    let log = Log::new();
    for index in 0..2 {
        let used = if index == 0 { 0x30000 } else { 0x70000 };
        switch.set_log_addr(receiver.port, index, Some(used)).expect("the queue runs");
    }
    let logged = receiver.memory.with_log(Some(log.log.clone())).expect("it covers the memory");
    let stop = AtomicBool::new(false);
    let (copy, sent) = std::thread::scope(|scope| {
        let sending = scope.spawn(|| send_until(&mut sender, &stop));
        switch.set_memory(receiver.port, &logged).expect("the rings lie in it");
        let mut copy = vec![0; MEMORY as usize];
        copy_pages(&receiver, &mut copy, 0..PAGES);
        let mut received = 0;
        for _ in 0..ROUNDS {
            until(|| receiver.poll());
            received += 1;
            while receiver.poll().is_some() {
                received += 1;
            }
            // What the driver wrote: a hypervisor sees that without us.
            copy_pages(&receiver, &mut copy, DRIVER_PAGES);
            copy_pages(&receiver, &mut copy, log.take());
        }
        // Frames that nobody takes any more: only the log tells of them. There is room for eight.
        until(|| (stats(&switch, receiver.port).sent[0].frames >= received + 3).then_some(()));
        for index in 0..2 {
            switch.stop_queue(receiver.port, index).expect("the port is there").expect("it ran");
        }
        copy_pages(&receiver, &mut copy, log.take());
        stop.store(true, Ordering::Relaxed);
        (copy, sending.join().expect("the sender runs"))
    });
    assert!(sent > 0);
    let differ: Vec<usize> =
        (0..PAGES).filter(|page| receiver.read((page * PAGE) as u64, PAGE) != copy[page * PAGE..][..PAGE]).collect();
    assert!(differ.is_empty(), "pages written and not logged: {differ:x?}");
    assert!(log.take().is_empty(), "nothing is marked after the queues have stopped");
}

#[test]
fn a_copy_of_a_split_queue_is_complete() {
    migrate(Layout::Split, true);
    migrate(Layout::Split, false);
}

#[test]
fn a_copy_of_a_packed_queue_is_complete() {
    migrate(Layout::Packed, true);
    migrate(Layout::Packed, false);
}
