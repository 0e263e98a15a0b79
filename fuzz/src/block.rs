//! Requests to a block device: any header and segments, in any pieces, which may lie on top of each other. What is let through
//! must lie inside the disk, and touch nothing but the guest's memory.

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_devices::block::Range;
use viaduct_devices::block::request::{Disk, F_DISCARD, F_WRITE_ZEROES, Kind, Parsed, SEGMENTS, parse};
use viaduct_memory::{RegionCache, Span};
use viaduct_ring::{Batch, Chain};

use crate::guest_memory::{Guest, SIZE};

thread_local!(static GUEST: Guest = Guest::default());

/// Sectors that a disk of the input has at most.
const SECTORS: u64 = 1 << 24;

/// A sector that is often near an end of the disk.
fn sector(u: &mut Unstructured, disk: &Disk) -> Result<u64> {
    Ok(match u.int_in_range(0..=3u8)? {
        0 => u.arbitrary()?,
        1 => u64::from(u.arbitrary::<u8>()?),
        _ => (disk.size / 512).wrapping_add(u64::from(u.arbitrary::<u8>()?)).wrapping_sub(128),
    })
}

/// Pieces of guest memory, `len` bytes in all or a few more or less.
fn pieces(u: &mut Unstructured, guest: &Guest, mut len: u32, spans: &mut Vec<Span>) -> Result<(u16, u32)> {
    len = len.saturating_add_signed(i32::from(u.int_in_range(-1..=1i8)?));
    let (mut count, mut total) = (0, 0);
    while total < len && count < 64 {
        let now = if u.ratio(1, 4)? { u.int_in_range(0..=20)? } else { len - total };
        let addr = u.int_in_range(0..=SIZE - 1)?;
        let Some(span) = guest.memory.translate_some(&mut RegionCache::default(), addr, now) else { break };
        total += span.len();
        spans.push(span);
        count += 1;
    }
    Ok((count, total))
}

fn check_ranges(disk: &Disk, ranges: &[Range]) {
    assert!(!disk.read_only && ranges.len() <= SEGMENTS);
    for range in ranges {
        assert!(range.len > 0 && range.offset.checked_add(range.len).is_some_and(|end| end <= disk.size), "{range:?}");
    }
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    GUEST.with(|guest| {
        guest.reset();
        let disk = Disk {
            size: 512 * u.int_in_range(1..=SECTORS)?,
            read_only: u.ratio(1, 8)?,
            features: if u.ratio(1, 8)? { u.arbitrary()? } else { F_DISCARD | F_WRITE_ZEROES },
        };
        let mut found = Vec::new();
        while !u.is_empty() {
            let mut batch = Batch::default();
            let kind = if u.ratio(1, 8)? { u.arbitrary()? } else { *u.choose(&[0u32, 1, 4, 8, 11, 13])? };
            let mut request = Vec::new();
            request.extend(kind.to_le_bytes());
            request.extend(0u32.to_le_bytes());
            request.extend(sector(u, &disk)?.to_le_bytes());
            let segments = if kind >= 11 { u.int_in_range(0..=SEGMENTS + 1)? } else { 0 };
            for _ in 0..segments {
                request.extend(sector(u, &disk)?.to_le_bytes());
                request.extend(u.int_in_range(0..=1u32 << 22)?.to_le_bytes());
                request.extend(if u.ratio(1, 8)? { u.arbitrary()? } else { 0u32 }.to_le_bytes());
            }
            let sectors = u32::from(u.int_in_range(0..=20u8)?);
            let out = request.len() as u32 + if kind == 1 { 512 * sectors } else { 0 };
            let (readable, readable_len) = pieces(u, guest, out, &mut batch.spans)?;
            let input = 1 + if kind == 0 { 512 * sectors } else { 20 };
            let (writable, writable_len) = pieces(u, guest, input, &mut batch.spans)?;
            let mut left = &request[..];
            for span in &batch.spans[..readable.into()] {
                let (now, later) = left.split_at(left.len().min(span.len() as usize));
                // SAFETY: the guest keeps its memory.
                unsafe { span.write(0, now) };
                left = later;
            }
            let chain = Chain { id: 0, slots: 1, first: 0, readable, writable, readable_len, writable_len };
            // SAFETY: the guest keeps its memory.
            let parsed = unsafe { parse(&disk, &batch, &chain, &mut found) };
            let len: u64 = found.iter().map(|span| u64::from(span.len())).sum();
            found.iter().for_each(|span| guest.check_span(*span));
            match parsed {
                Parsed::Run(kind, status) => {
                    assert_eq!(status.len(), 1);
                    guest.check_span(status);
                    match kind {
                        Kind::In(offset) | Kind::Out(offset) => {
                            assert!(len > 0 && len.is_multiple_of(512) && offset + len <= disk.size);
                            let write = matches!(kind, Kind::Out(_));
                            assert_eq!(
                                len,
                                if write { u64::from(readable_len) - 16 } else { u64::from(writable_len) - 1 }
                            );
                            assert!(!(write && disk.read_only));
                        }
                        Kind::Discard(ranges) | Kind::WriteZeroes(ranges) => check_ranges(&disk, &ranges),
                        Kind::Flush | Kind::GetId => {}
                    }
                }
                Parsed::Answer(_, status, problem) => {
                    assert!(status.len() == 1 && !problem.is_empty());
                    guest.check_span(status);
                }
                Parsed::Unanswerable(_) => assert_eq!(writable_len, 0),
            }
        }
        guest.check();
        Ok(())
    })
}
