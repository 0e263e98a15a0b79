//! The device side of a virtqueue against any driver, and against any record of chains in flight.

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_ring::{Batch, DeviceQueue, Layout, QueueConfig, inflight_bytes};

use crate::guest_memory::{Guest, record};
use crate::ring::{config, poke};

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
    let u = &mut Unstructured::new(data);
    let result = play(u, guest, layout);
    guest.check();
    result
}

fn play(u: &mut Unstructured, guest: &Guest, layout: Layout) -> Result<()> {
    let config = config(u, layout, 0)?;
    let Ok(mut device) = DeviceQueue::new(guest.memory.clone(), &config) else { return Ok(()) };
    if u.int_in_range(0..=7u8)? == 0 {
        device.set_read_only();
    }
    if u.int_in_range(0..=7u8)? == 0 {
        let bytes = inflight_bytes(layout, config.size);
        let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
        let offset = if u.arbitrary()? { 0 } else { u.int_in_range(0..=bytes)? };
        // A record that is refused is left alone.
        let _ = device.attach_inflight(record(bytes, u.bytes(len)?), offset);
    }
    let mut batch = Batch::default();
    while !u.is_empty() {
        match u.int_in_range(0..=31u8)? {
            0..=19 => poke(u, guest, &config)?,
            20..=27 => serve(u, guest, &mut device, &mut batch)?,
            28 => drop(device.enable_notifications()),
            29 => device.disable_notifications(),
            30 => {
                // Its rings lie in the first region; a buffer may not be there any more.
                let memory = if u.arbitrary()? { &guest.half } else { &guest.memory };
                device.set_memory(memory.clone()).expect("the rings lie in either");
            }
            _ => {
                let base = device.base();
                check_base(&config, base);
                let broken = device.broken().cloned();
                drop(device);
                let again = QueueConfig { base, ..config };
                device = match (DeviceQueue::new(guest.memory.clone(), &again), broken) {
                    (Ok(device), _) => device,
                    // What was taken and given back after the rule was broken need not add up.
                    (Err(_), Some(_)) => return Ok(()),
                    (Err(error), None) => panic!("a queue does not start where it stood, {base:#x}: {error}"),
                };
            }
        }
    }
    Ok(())
}

/// Looks at chains, takes some of them, writes into them and gives them back, perhaps in another order.
fn serve(u: &mut Unstructured, guest: &Guest, device: &mut DeviceQueue, batch: &mut Batch) -> Result<()> {
    batch.clear();
    let most = u.int_in_range(1..=64)?;
    let Ok(found) = device.peek(batch, most) else {
        assert!(device.broken().is_some());
        assert!(device.peek(batch, most).is_err(), "an error is for good");
        return Ok(());
    };
    assert!(found == batch.chains.len() && found <= most);
    for chain in &batch.chains {
        let (readable, writable) = (batch.readable(chain), batch.writable(chain));
        let sum = |spans: &[viaduct_memory::Span]| spans.iter().map(|span| u64::from(span.len())).sum::<u64>();
        assert_eq!(sum(readable), u64::from(chain.readable_len));
        assert_eq!(sum(writable), u64::from(chain.writable_len));
        for span in readable.iter().chain(writable) {
            assert!(!span.is_empty());
            guest.check_span(*span);
        }
        for span in writable {
            // SAFETY: the queue keeps the memory.
            unsafe { span.write(span.len() - 1, &[0xa5]) };
        }
    }
    let take = u.int_in_range(0..=found)?;
    let chains = &batch.chains[..take];
    device.consume(chains);
    let backwards = !device.config().in_order && u.arbitrary()?;
    let written = u.arbitrary::<u32>()?;
    for index in 0..take {
        let chain = &chains[if backwards { take - 1 - index } else { index }];
        device.complete(chain, written.min(chain.writable_len));
    }
    device.publish();
    check_base(device.config(), device.base());
    Ok(())
}

/// Positions in a packed ring lie in it (virtio 1.2, 2.8.1).
fn check_base(config: &QueueConfig, base: u32) {
    let (available, used) = (base & 0x7fff, base >> 16 & 0x7fff);
    assert!(config.layout == Layout::Split || (available < config.size && used < config.size), "{base:#x}");
}
