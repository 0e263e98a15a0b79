//! Either side against random bytes: an error or chains that lie in memory, never a panic, never an access outside.

mod rig;

use proptest::prelude::*;
use rig::{DATA, Rig, TABLES, config};
use viaduct_ring::{Batch, Layout, QueueConfig, RingLayout};

/// Addresses that are often good.
fn addr() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => DATA..DATA + 4096,
        2 => (0u64..64).prop_map(|i| TABLES + 16 * i),
        1 => any::<u64>(),
        1 => TABLES + u64::from(rig::TABLES_LEN) - 8..=TABLES + u64::from(rig::TABLES_LEN),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..200, 2 => (1u32..8).prop_map(|n| 16 * n), 1 => any::<u32>()]
}

/// The two words of a descriptor in either layout: fields that are often good, bits that are anything.
fn descriptor(size: u16) -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let flags = prop_oneof![6 => 0u16..4, 2 => Just(4u16), 1 => 0u16..8, 1 => any::<u16>()];
    let index = prop_oneof![8 => 0..size, 1 => any::<u16>()];
    (addr(), len(), flags, index)
}

/// One write into the rings, at any time.
#[derive(Clone, Debug)]
enum Poke {
    Descriptor(u16, (u64, u32, u16, u16)),
    Table(u16, (u64, u32, u16, u16)),
    /// A 16-bit field of the driver or device part.
    Field(bool, u16, u16),
    /// Moves an index a little on.
    Index(bool, u16),
}

fn pokes(size: u16) -> impl Strategy<Value = Vec<Poke>> {
    let poke = prop_oneof![
        4 => (0..size, descriptor(size)).prop_map(|(i, d)| Poke::Descriptor(i, d)),
        2 => (0u16..64, descriptor(8)).prop_map(|(i, d)| Poke::Table(i, d)),
        2 => (any::<bool>(), 2u16..64, prop_oneof![8 => 0..size, 1 => any::<u16>()])
            .prop_map(|(part, at, value)| Poke::Field(part, at, value)),
        1 => (any::<bool>(), 0u16..64, any::<u16>()).prop_map(|(part, at, value)| Poke::Field(part, at, value)),
        4 => (any::<bool>(), prop_oneof![8 => 0..=size, 1 => any::<u16>()]).prop_map(|(part, by)| Poke::Index(part, by)),
    ];
    prop::collection::vec(poke, 1..60)
}

fn setting() -> impl Strategy<Value = (QueueConfig, Vec<Vec<Poke>>)> {
    let config = (any::<bool>(), 0u32..5, 1u32..20, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(packed, log, size, event_idx, indirect, in_order)| {
            let config = if packed { config(Layout::Packed, size) } else { config(Layout::Split, 1 << log) };
            QueueConfig { event_idx, indirect, in_order, ..config }
        },
    );
    config.prop_flat_map(|config| (Just(config), prop::collection::vec(pokes(config.size as u16), 1..12)))
}

fn poke(rig: &Rig, config: &QueueConfig, poke: &Poke) {
    let write = |table: u64, index: u16, (addr, len, flags, other): (u64, u32, u16, u16)| match config.layout {
        Layout::Split => rig.split_descriptor(table, index.into(), addr, len, flags, other),
        // Often available in the first lap.
        Layout::Packed => rig.packed_descriptor(table, index.into(), addr, len, other, flags ^ 1 << 7),
    };
    let parts = RingLayout::new(config.layout, config.size, config.event_idx).unwrap();
    let part = |driver: bool| {
        if driver { (config.driver_addr, parts.driver.size) } else { (config.device_addr, parts.device.size) }
    };
    match *poke {
        Poke::Descriptor(index, descriptor) => write(config.descriptor_addr, index, descriptor),
        Poke::Table(index, descriptor) => write(TABLES, index, descriptor),
        Poke::Field(driver, at, value) => {
            let (start, size) = part(driver);
            rig.put(start + 2 * u64::from(at) % size, value.to_le_bytes());
        }
        Poke::Index(driver, by) => {
            let (start, _) = part(driver);
            let value = rig.get_u16(start + 2).wrapping_add(by);
            rig.put(start + 2, value.to_le_bytes());
        }
    }
}

/// Looks at all chains, and touches both ends of every span.
fn serve(rig: &mut Rig, batch: &mut Batch) {
    batch.clear();
    let Ok(found) = rig.device.peek(batch, 64) else { return };
    assert_eq!(found, batch.chains.len());
    for chain in &batch.chains {
        let sum = |spans: &[viaduct_memory::Span]| spans.iter().map(|span| u64::from(span.len())).sum::<u64>();
        assert_eq!(sum(batch.readable(chain)), chain.readable_len.into());
        assert_eq!(sum(batch.writable(chain)), chain.writable_len.into());
        for span in batch.readable(chain) {
            assert!(!span.is_empty());
            let mut byte = [0];
            // SAFETY: the rig keeps the memory; were the span not inside, this would crash.
            unsafe {
                span.read(0, &mut byte);
                span.read(span.len() - 1, &mut byte);
            }
        }
        for span in batch.writable(chain) {
            // SAFETY: as above.
            unsafe {
                span.write(0, &[0xa5]);
                span.write(span.len() - 1, &[0xa5]);
            }
        }
    }
    rig.device.consume(&batch.chains);
    for chain in &batch.chains {
        rig.device.complete(chain, chain.writable_len);
    }
    rig.device.publish();
    rig.device.enable_notifications();
    let base = rig.device.base();
    let index = (base & 0x7fff, base >> 16 & 0x7fff);
    let config = rig.device.config();
    assert!(config.layout == Layout::Split || (index.0 < config.size && index.1 < config.size));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn a_device_survives_any_driver((config, rounds) in setting()) {
        let mut rig = Rig::new(&config);
        let mut batch = Batch::default();
        for round in &rounds {
            for p in round {
                poke(&rig, &config, p);
            }
            serve(&mut rig, &mut batch);
        }
        if let Err(error) = rig.device.peek(&mut batch, 1) {
            prop_assert_eq!(rig.device.peek(&mut batch, 64), Err(error));
        }
    }

    #[test]
    fn a_driver_survives_any_device((config, rounds) in setting()) {
        let mut rig = Rig::new(&config);
        let mut tokens = std::collections::HashSet::new();
        let mut next = 0;
        for round in &rounds {
            for p in round {
                for (out, input) in [(&[(DATA, 9)][..], &[][..]), (&[(DATA, 1), (DATA, 2)], &[(DATA, 3)])] {
                    if rig.driver.add(out, input, next) == Ok(true) {
                        tokens.insert(next);
                        next += 1;
                    }
                }
                poke(&rig, &config, p);
                rig.driver.publish();
                let mut used = Vec::new();
                let result = rig.driver.take_many(&mut used, 64);
                for (token, written) in used {
                    prop_assert!(tokens.remove(&token), "token {} came back twice", token);
                    prop_assert!(written <= 3);
                }
                prop_assert!(rig.driver.free() <= config.size as usize);
                if let Err(error) = result {
                    prop_assert_eq!(rig.driver.take(), Err(error));
                }
                rig.driver.enable_notifications();
            }
        }
    }
}
