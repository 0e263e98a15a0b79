//! How fast is the opaque copy? Prints nanoseconds for each length beside the C library's `memcpy`, once with both
//! buffers in the first-level cache and once walking through 4 MiB.
//!
//! `cargo run --release -p viaduct-memory --example copy_speed`

use std::hint::black_box;
use std::time::Instant;

use viaduct_memory::access;

const LENGTHS: [usize; 12] = [12, 60, 64, 128, 256, 512, 1024, 1500, 4096, 9000, 16384, 65536];
const WALK: usize = 4 << 20;

type Copy = unsafe fn(*mut u8, *const u8, usize);

fn nanoseconds(copy: Copy, len: usize, walk: usize, source: &[u8], target: &mut [u8]) -> f64 {
    // Frames lie at two bytes past a multiple of four, and behind a header of 10 or 12 bytes.
    const FROM: usize = 10;
    const TO: usize = 12;
    let stride = (len + 64).next_multiple_of(4096);
    let places = (walk / stride).max(1);
    let rounds = (200_000_000 / (len + 400)).min(400_000);
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        let mut place = 0;
        for _ in 0..rounds {
            place = if place + 1 == places { 0 } else { place + 1 };
            let at = place * stride;
            let (to, from) = (target[at + TO..].as_mut_ptr(), source[at + FROM..].as_ptr());
            // SAFETY: a place has room for `len + 64` bytes.
            unsafe { copy(black_box(to), black_box(from), black_box(len)) };
        }
        best = best.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(u32::try_from(rounds).unwrap_or(u32::MAX)));
    }
    best
}

fn main() {
    let memcpy: Copy = |dst, src, len| {
        // SAFETY: given by the caller; nobody else writes here.
        unsafe { std::ptr::copy_nonoverlapping(src, dst, len) };
    };
    // SAFETY: given by the caller.
    let opaque: Copy = |dst, src, len| unsafe { access::copy(dst, src, len) };
    let room = 2 * WALK;
    let (source, mut target) = (vec![1u8; room], vec![0u8; room]);
    println!("{:>8} {:>18} {:>18}", "bytes", "ns in L1", "ns in 4 MiB");
    println!("{:>8} {:>9} {:>8} {:>9} {:>8}", "", "memcpy", "opaque", "memcpy", "opaque");
    for len in LENGTHS {
        print!("{len:>8}");
        for walk in [0, WALK] {
            for copy in [memcpy, opaque] {
                print!(" {:>8.2}", nanoseconds(copy, len, walk, &source, &mut target));
            }
        }
        println!();
    }
}
