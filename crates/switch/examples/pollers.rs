//! What a second poller gives, where there are no more processors than pollers: two pairs of guests in this process, each
//! pair the business of one poller, and both pollers at work at the same time while nobody else runs.
//!
//! ```text
//! cargo build --release -p viaduct-switch --example pollers
//! target/release/examples/pollers CPU CPU 20
//! ```
//!
//! A generator that kept the rings filled would need processors of its own. So rings of 32,768 descriptors are filled
//! while the pollers sleep; then they are woken, this thread sleeps, and each poller's own count of frames and of the time
//! it spent on them says what it achieved. In each round the first pair works alone, then the second, then both. Prints a
//! line of JSON for each round: frames a second of each poller alone and together with the other.

mod guest;

use std::io::Write;
use std::time::Duration;

use guest::{Guest, HEADER, Rings, event_fd, frame};
use viaduct_ring::Layout;
use viaduct_switch::clock::ticks_per_second;
use viaduct_switch::{Polling, Switch};

const QUEUE: u32 = 32768;
const FRAME: u64 = 64;
const PAIRS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(30);

/// Two guests, of which one sends to the other.
struct Pair {
    sender: Guest,
    receiver: Guest,
}

impl Pair {
    /// Queues are given to pollers in turn, so the sender of the first pair is plugged first and that of the second last.
    fn plug(switch: &Switch, number: u8) -> Pair {
        let rings = Rings { layout: Layout::Split, size: QUEUE, mergeable: true };
        let [first, second] = [(); 2].map(|()| Guest::plug(switch, rings));
        let (sender, receiver) = if number == 0 { (first, second) } else { (second, first) };
        for slot in 0..guest::BUFFERS {
            sender.write(frame(slot), &[0; HEADER as usize]);
            sender.write(frame(slot) + HEADER, &[2, 0, 0, 0, number, 2, 2, 0, 0, 0, number, 1, 0x88, 0xb5]);
        }
        receiver.write(frame(0), &[0; HEADER as usize]);
        receiver.write(frame(0) + HEADER, &[2, 0, 0, 0, number, 1, 2, 0, 0, 0, number, 2, 0x88, 0xb5]);
        Pair { sender, receiver }
    }

    /// Makes both stations known.
    fn announce(&mut self) {
        self.receiver.transmit.add_single(frame(0), (HEADER + FRAME) as u32, false, 0);
        self.receiver.publish();
        self.sender.transmit.add_single(frame(0), (HEADER + FRAME) as u32, false, 0);
        self.sender.publish();
        std::thread::sleep(Duration::from_millis(20));
        self.sender.drain();
        self.receiver.drain();
    }

    fn fill(&mut self) {
        for n in 0..u64::from(QUEUE) {
            self.sender.transmit.add_single(frame(n), (HEADER + FRAME) as u32, false, n);
        }
    }

    fn drain(&mut self) -> u64 {
        self.sender.drain();
        self.receiver.drain()
    }
}

/// Frames and busy seconds of each poller.
fn work(switch: &Switch) -> Vec<(u64, f64)> {
    let stats = switch.poller_stats();
    stats.iter().map(|poller| (poller.frames, poller.busy_ticks as f64 / ticks_per_second() as f64)).collect()
}

/// Lets these pairs' pollers work through full rings. Returns frames for each busy second, by poller.
fn run(switch: &Switch, pairs: &mut [Pair], which: &[usize]) -> Vec<f64> {
    for &index in which {
        pairs[index].fill();
    }
    let before = work(switch);
    let begin = std::time::Instant::now();
    for &index in which {
        pairs[index].sender.publish();
    }
    let done = |before: &[(u64, f64)]| {
        let now = work(switch);
        which.iter().all(|&index| now[index].0 - before[index].0 >= u64::from(QUEUE))
    };
    loop {
        std::thread::sleep(Duration::from_millis(8)); // not to be in anybody's way
        if done(&before) {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "the pollers have not forwarded what was sent");
    }
    let after = work(switch);
    for &index in which {
        assert_eq!(pairs[index].drain(), u64::from(QUEUE), "frames were lost on pair {index}");
    }
    let rate = |index: usize| (after[index].0 - before[index].0) as f64 / (after[index].1 - before[index].1);
    which.iter().map(|&index| rate(index)).collect()
}

fn main() {
    let numbers: Vec<usize> =
        std::env::args().skip(1).map(|word| word.parse().expect("CPU CPU ROUNDS, all numbers")).collect();
    let &[first, second, rounds] = &numbers[..] else { panic!("usage: pollers CPU CPU ROUNDS") };
    let switch = Switch::new(&[Some(first), Some(second)], Polling::Interrupt, event_fd()).expect("two pollers");
    let mut pairs: Vec<Pair> = (0..PAIRS).map(|number| Pair::plug(&switch, number as u8)).collect();
    pairs.iter_mut().for_each(Pair::announce);
    for round in 0..=rounds {
        let alone: Vec<f64> = (0..PAIRS).flat_map(|index| run(&switch, &mut pairs, &[index])).collect();
        let together = run(&switch, &mut pairs, &[0, 1]);
        if round > 0 {
            // The first is for caches and tables.
            println!(r#"{{"alone":{alone:?},"together":{together:?}}}"#);
            std::io::stdout().flush().expect("standard output");
        }
    }
}
