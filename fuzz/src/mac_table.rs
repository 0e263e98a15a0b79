//! The forwarding table against a map: it may forget, but what it answers must be the last port learned.

use std::collections::HashMap;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_switch::mac_table::{MAX_PORTS, MacTable};

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let table = MacTable::new();
    let mut learned: HashMap<(u64, u16), u16> = HashMap::new();
    while !u.is_empty() {
        let station = |u: &mut Unstructured| -> Result<(u64, u16)> {
            let mac = match u.int_in_range(0..=3u8)? {
                0 => u.arbitrary::<u64>()? & 0xffff_ffff_ffff,
                _ => u64::from(u.arbitrary::<u8>()?) << 40 | 2,
            };
            Ok((mac, u.int_in_range(0..=4095)?))
        };
        match u.int_in_range(0..=15u8)? {
            0..=6 => {
                let (mac, vlan) = station(u)?;
                let port = u.int_in_range(0..=MAX_PORTS as u16 - 1)?;
                table.learn(table.key(mac, vlan), port);
                learned.insert((mac, vlan), port);
            }
            7..=10 => {
                let (mac, vlan) = station(u)?;
                if let Some(port) = table.lookup(table.key(mac, vlan)) {
                    assert_eq!(learned.get(&(mac, vlan)), Some(&port), "{mac:#x} in {vlan}");
                }
            }
            11 => {
                // Many at once, so that buckets fill.
                let start = u.arbitrary::<u16>()?;
                for n in 0..u64::from(u.arbitrary::<u8>()?) * 16 {
                    let mac = (u64::from(start) + n) << 16 | 2;
                    table.learn(table.key(mac, 0), 7);
                    learned.insert((mac, 0), 7);
                }
            }
            12 => drop(table.tick()),
            13 => {
                let port = u.int_in_range(0..=MAX_PORTS as u16 - 1)?;
                table.forget_port(port);
                learned.retain(|_, other| *other != port);
            }
            _ => {
                for entry in table.entries() {
                    let [a, b, c, d, e, f] = entry.mac;
                    let mac = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
                    assert_eq!(learned.get(&(mac, entry.vlan)), Some(&entry.port), "an entry that was never learned");
                }
            }
        }
    }
    Ok(())
}
