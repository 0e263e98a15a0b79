//! A fixed load for counting instructions: two guests in this process send frames to each other through a real switch.
//!
//! ```text
//! cargo build --release -p viaduct-switch --example forward
//! valgrind --tool=callgrind --toggle-collect='*Forwarder::forward*' target/release/examples/forward split 64 20000
//! ```
//!
//! Arguments: `split` or `packed`, frame size, number of frames, and optionally `scattered` (header and frame in buffers
//! of their own), `unmergeable` (each frame in one receive buffer) and `macs=N` (source addresses, up to 65,536). Prints
//! the number of frames that arrived; whatever the machine is doing meanwhile, the instructions that the switch spends on
//! each are the same.

mod guest;

use guest::{Guest, HEADER, Rings, event_fd, frame};
use viaduct_ring::Layout;
use viaduct_switch::{Polling, Switch};

const BATCH: u64 = 32;
const QUEUE: u32 = 256;
/// Where in a frame the last two bytes of its source address are.
const SOURCE_END: u64 = 10;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut next = |default: &str| arguments.next().unwrap_or_else(|| default.to_owned());
    let layout = if next("split") == "packed" { Layout::Packed } else { Layout::Split };
    let size: u64 = next("64").parse().expect("a frame size");
    let frames: u64 = next("20000").parse().expect("a number of frames");
    let options: Vec<String> = arguments.collect();
    let scattered = options.iter().any(|option| option == "scattered");
    let mergeable = !options.iter().any(|option| option == "unmergeable");
    let macs = options.iter().find_map(|option| option.strip_prefix("macs=")?.parse().ok()).unwrap_or(1u64);

    let switch = Switch::new(&[None], Polling::Interrupt, event_fd()).expect("a poller");
    let [mut a, mut b] = [(); 2].map(|()| Guest::plug(&switch, Rings { layout, size: QUEUE, mergeable }));
    for slot in 0..u64::from(QUEUE) {
        a.write(frame(slot), &[0; HEADER as usize]);
        a.write(frame(slot) + HEADER, &[2, 0, 0, 0, 1, 1, 2, 0, 0, 1, 0, 0, 0x88, 0xb5]);
    }
    // The receiver announces itself, or everything would be flooded.
    b.write(frame(0), &[0; HEADER as usize]);
    b.write(frame(0) + HEADER, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 1, 1, 0x88, 0xb5]);
    b.transmit.add_single(frame(0), (HEADER + 60) as u32, false, 0);
    b.publish();
    while a.drain() == 0 {
        std::thread::yield_now();
    }
    let (mut sent, mut received) = (0, 0);
    while received < frames {
        // One batch at a time, so that every run sees the same batches.
        for _ in 0..BATCH {
            let at = frame(sent);
            a.write(at + HEADER + SOURCE_END, &((sent % macs) as u16).to_be_bytes());
            if scattered {
                let pieces = [(at, HEADER as u32), (at + HEADER, size as u32)];
                a.transmit.add(&pieces, &[], 0).expect("a legal chain");
            } else {
                a.transmit.add_single(at, (HEADER + size) as u32, false, 0);
            }
            sent += 1;
        }
        a.publish();
        while received < sent {
            received += b.drain();
            std::thread::yield_now();
        }
        a.drain();
    }
    println!("{received}");
}
