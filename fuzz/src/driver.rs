//! The driver side of a virtqueue against any device.

use std::collections::HashMap;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_ring::{DriverQueue, Layout};

use crate::guest_memory::Guest;
use crate::ring::{DATA, TABLES, TABLES_LEN, config, poke};

thread_local!(static GUEST: Guest = Guest::default());

/// A split queue.
pub fn split(data: &[u8]) -> Result<()> {
    GUEST.with(|guest| run(guest, Layout::Split, data))
}

/// A packed queue.
pub fn packed(data: &[u8]) -> Result<()> {
    GUEST.with(|guest| run(guest, Layout::Packed, data))
}

fn run(guest: &Guest, layout: Layout, data: &[u8]) -> Result<()> {
    guest.reset();
    let result = play(&mut Unstructured::new(data), guest, layout);
    guest.check();
    result
}

fn play(u: &mut Unstructured, guest: &Guest, layout: Layout) -> Result<()> {
    let config = config(u, layout, 0)?;
    let Ok(mut driver) = DriverQueue::new(guest.memory.clone(), &config) else { return Ok(()) };
    if config.indirect {
        driver.set_indirect_area(TABLES, TABLES_LEN).expect("an area in memory");
    }
    // The bytes that the device may write into each buffer it holds.
    let mut held = HashMap::new();
    let mut next = 0;
    let mut used = Vec::new();
    while !u.is_empty() {
        match u.int_in_range(0..=15u8)? {
            0..=3 => {
                let out: Vec<_> = (0..u.int_in_range(0..=3u64)?).map(|at| (DATA + at, 1)).collect();
                let room = u.int_in_range(0..=300u32)?;
                let input = if room == 0 { vec![] } else { vec![(DATA + 100, room)] };
                let free = driver.free();
                match driver.add(&out, &input, next) {
                    Ok(true) => {
                        held.insert(next, room);
                        next += 1;
                        assert!(driver.free() < free);
                    }
                    Ok(false) | Err(_) => assert_eq!(driver.free(), free),
                }
            }
            4 => drop(driver.publish()),
            5..=10 => poke(u, guest, &config)?,
            11 => drop(driver.enable_notifications()),
            12 => driver.disable_notifications(),
            _ => {
                used.clear();
                let result = driver.take_many(&mut used, u.int_in_range(1..=64)?);
                for (token, written) in &used {
                    let room = held.remove(token).expect("only a buffer that is held comes back, once");
                    assert!(*written <= room, "{written} bytes in a buffer of {room}");
                }
                if result.is_err() {
                    assert!(driver.take().is_err(), "an error is for good");
                }
            }
        }
        assert!(driver.free() <= config.size as usize);
    }
    Ok(())
}
