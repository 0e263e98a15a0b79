//! A queue's place, and what a hostile peer writes into it.

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_ring::{Layout, PACKED_START, QueueConfig, RingLayout};

use crate::guest_memory::{Guest, SECOND, SIZE, USER};

/// Where indirect tables lie, and how many bytes they have.
pub const TABLES: u64 = SECOND - TABLES_LEN as u64;
pub const TABLES_LEN: u32 = 0x2000;
/// Where buffers lie: across the border of the two regions.
pub const DATA: u64 = SECOND - 0x1000;

/// A queue with its parts from guest-physical address `start` on; the size and all options come from the input.
pub fn config(u: &mut Unstructured, layout: Layout, start: u64) -> Result<QueueConfig> {
    let size = match layout {
        Layout::Split => 1 << u.int_in_range(0..=7u32)?,
        Layout::Packed => u.int_in_range(1..=128)?,
    };
    let options: u8 = u.arbitrary()?;
    let base = match (options >> 6, layout) {
        (0, _) => u.arbitrary()?,
        (1, Layout::Split) => 65530,
        (_, Layout::Split) => 0,
        (_, Layout::Packed) => PACKED_START,
    };
    Ok(QueueConfig {
        event_idx: options & 1 != 0,
        indirect: options & 2 != 0,
        in_order: options & 4 != 0,
        base,
        ..placed(layout, size, start)
    })
}

/// A queue without options.
pub fn placed(layout: Layout, size: u32, start: u64) -> QueueConfig {
    let parts = RingLayout::new(layout, size, true).expect("a legal size");
    let (descriptor_addr, driver_addr, device_addr, _) = parts.place(USER + start);
    QueueConfig {
        layout,
        size,
        descriptor_addr,
        driver_addr,
        device_addr,
        base: if layout == Layout::Packed { PACKED_START } else { 0 },
        event_idx: false,
        indirect: false,
        in_order: false,
    }
}

/// An address that is often good.
fn addr(u: &mut Unstructured) -> Result<u64> {
    Ok(match u.int_in_range(0..=7u8)? {
        0..=3 => DATA + u64::from(u.int_in_range(0..=0x1fffu16)?),
        4 | 5 => TABLES + 16 * u64::from(u.arbitrary::<u8>()?),
        6 => SIZE - u64::from(u.arbitrary::<u8>()?),
        _ => u.arbitrary()?,
    })
}

fn len(u: &mut Unstructured) -> Result<u32> {
    Ok(match u.int_in_range(0..=7u8)? {
        0..=3 => u.arbitrary::<u8>()?.into(),
        4 | 5 => 16 * u32::from(u.int_in_range(1..=8u8)?),
        6 => u.arbitrary::<u16>()?.into(),
        _ => u.arbitrary()?,
    })
}

/// Writes something into the queue's parts or an indirect table, as a peer could at any time.
pub fn poke(u: &mut Unstructured, guest: &Guest, config: &QueueConfig) -> Result<()> {
    let parts = RingLayout::new(config.layout, config.size, config.event_idx).expect("a legal size");
    let [descriptors, driver, device] =
        [config.descriptor_addr, config.driver_addr, config.device_addr].map(|addr| addr - USER);
    let index_below = |u: &mut Unstructured, below: u64| u.int_in_range(0..=below - 1);
    match u.int_in_range(0..=9u8)? {
        kind @ 0..=4 => {
            // A descriptor: of the ring, or of a table.
            let at = match kind {
                4 => TABLES + 16 * u64::from(u.int_in_range(0..=63u8)?),
                _ => descriptors + 16 * index_below(u, config.size.into())?,
            };
            let (addr, len) = (addr(u)?, len(u)?);
            let mut flags = match u.int_in_range(0..=3u8)? {
                0 | 1 => u.int_in_range(0..=3u16)?,
                2 => 4,
                _ => u.arbitrary()?,
            };
            let other = match u.int_in_range(0..=7u8)? {
                0 => u.arbitrary()?,
                _ => u.int_in_range(0..=config.size as u16 - 1)?,
            };
            if config.layout == Layout::Packed {
                // Often available in the first lap (virtio 1.2, 2.8.1).
                flags ^= 1 << 7;
            }
            let (second, third) = if config.layout == Layout::Packed { (other, flags) } else { (flags, other) };
            let descriptor =
                [&addr.to_le_bytes()[..], &len.to_le_bytes(), &second.to_le_bytes(), &third.to_le_bytes()].concat();
            guest.write(at, &descriptor);
        }
        5 | 6 => {
            // One field of either side's part.
            let (start, size) = if u.arbitrary()? { (driver, parts.driver.size) } else { (device, parts.device.size) };
            let at = start + 2 * index_below(u, size / 2)?;
            let value: u16 = match u.int_in_range(0..=3u8)? {
                0 => u.arbitrary()?,
                _ => u.int_in_range(0..=config.size as u16)?,
            };
            guest.write(at, &value.to_le_bytes());
        }
        _ => {
            // An index of a split ring, moved on a little.
            let at = 2 + if u.int_in_range(0..=3u8)? == 0 { device } else { driver };
            let by = match u.int_in_range(0..=7u8)? {
                0 => u.arbitrary()?,
                _ => u.int_in_range(0..=config.size as u16)?,
            };
            let now = guest.read(at, 2);
            let next = u16::from_le_bytes([now[0], now[1]]).wrapping_add(by);
            guest.write(at, &next.to_le_bytes());
        }
    }
    Ok(())
}
