//! Random region tables against a model that looks at one byte at a time.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use proptest::prelude::*;
use viaduct_memory::{AddressSpace, GuestMemory, MAX_REGIONS, MemoryError, RegionCache, RegionSpec, Span, memfd};

/// Every region of a test lies in one file of this many bytes, whose bytes tell where they are.
const FILE: u64 = 16 * 4096;

fn byte_at(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

fn file() -> OwnedFd {
    let file = memfd(FILE).unwrap();
    let bytes: Vec<u8> = (0..FILE).map(byte_at).collect();
    File::from(file.try_clone().unwrap()).write_all(&bytes).unwrap();
    file
}

fn shared(file: &OwnedFd) -> OwnedFd {
    file.as_fd().try_clone_to_owned().unwrap()
}

fn region(guest_addr: u64, size: u64) -> RegionSpec {
    RegionSpec { guest_addr, size, user_addr: guest_addr.wrapping_add(1 << 40), mmap_offset: 0 }
}

fn bytes(span: Span) -> Vec<u8> {
    let mut bytes = vec![0; span.len() as usize];
    // SAFETY: the tests keep the memory.
    unsafe { span.read(0, &mut bytes) };
    bytes
}

fn expected(offset: u64, len: u32) -> Vec<u8> {
    (offset..offset + u64::from(len)).map(byte_at).collect()
}

/// Within 2^13 of 0 or of 2^64.
fn address() -> impl Strategy<Value = u64> {
    (any::<bool>(), 0u64..512, 0u64..16).prop_map(|(high, unit, odd)| {
        let low = unit * 16 + if odd == 0 { 5 } else { 0 };
        if high { low.wrapping_sub(8192) } else { low }
    })
}

fn spec() -> impl Strategy<Value = RegionSpec> {
    (address(), 0u64..600, address(), 0u64..FILE / 16 + 40).prop_map(|(guest_addr, size, user_addr, offset)| {
        RegionSpec { guest_addr, size, user_addr, mmap_offset: offset * 16 + guest_addr % 16 }
    })
}

/// Whether two ranges share a byte, counted in 128 bits.
fn meet(a: (u64, u64), b: (u64, u64)) -> bool {
    let (a, b) = ((u128::from(a.0), u128::from(a.1)), (u128::from(b.0), u128::from(b.1)));
    a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

fn may_be_added(model: &[RegionSpec], new: &RegionSpec) -> bool {
    let fits = |addr: u64| u128::from(addr) + u128::from(new.size) <= 1 << 64;
    new.size > 0
        && fits(new.guest_addr)
        && fits(new.user_addr)
        && new.mmap_offset + new.size <= FILE
        && new.user_addr % 16 == new.guest_addr % 16
        && !model.iter().any(|old| {
            meet((old.guest_addr, old.size), (new.guest_addr, new.size))
                || meet((old.user_addr, old.size), (new.user_addr, new.size))
        })
}

proptest! {
    #[test]
    fn agrees_with_the_model(
        steps in prop::collection::vec((spec(), any::<prop::sample::Index>(), 0u8..4), 1..40),
        probes in prop::collection::vec((address(), 0u64..48, 0u32..1200), 50),
    ) {
        let file = file();
        let mut memory = GuestMemory::new();
        let mut model: Vec<RegionSpec> = Vec::new();
        // One cache for all tables: a stale one must never matter.
        let mut cache = RegionCache::default();
        for (new, which, kind) in steps {
            if kind == 0 && !model.is_empty() {
                let old = model.remove(which.index(model.len()));
                memory = memory.without_region(&RegionSpec { mmap_offset: 1, ..old }).unwrap();
            } else {
                let added = memory.with_region(new, shared(&file));
                prop_assert_eq!(added.is_ok(), may_be_added(&model, &new), "{:?} {:?}", added, new);
                if let Ok(added) = added {
                    memory = added;
                    model.push(new);
                }
            }
            model.sort_by_key(|region| region.guest_addr);
            let regions: Vec<RegionSpec> = memory.regions().copied().collect();
            prop_assert_eq!(&regions, &model);
            for (addr, odd, len) in &probes {
                let addr = addr.wrapping_add(*odd);
                let hit = model.iter().find(|region| {
                    addr >= region.guest_addr && u128::from(addr) < u128::from(region.guest_addr) + u128::from(region.size)
                });
                let rest = hit.map(|region| (region.mmap_offset + (addr - region.guest_addr),
                                             region.size - (addr - region.guest_addr)));
                let whole = memory.translate(&mut cache, addr, *len).map(bytes);
                let want = rest.filter(|(_, rest)| u64::from(*len) <= *rest).map(|(at, _)| expected(at, *len));
                prop_assert_eq!(whole, want);
                let some = memory.translate_some(&mut cache, addr, *len).map(bytes);
                let want = rest.map(|(at, rest)| expected(at, (*len).min(u32::try_from(rest).unwrap())));
                prop_assert_eq!(some, want);
                let user = memory.translate_user(addr, *len).map(bytes);
                let want = model.iter().find_map(|region| {
                    let inside = addr >= region.user_addr
                        && u128::from(addr) + u128::from(*len)
                            <= u128::from(region.user_addr) + u128::from(region.size)
                        && addr - region.user_addr < region.size;
                    inside.then(|| expected(region.mmap_offset + (addr - region.user_addr), *len))
                });
                prop_assert_eq!(user, want);
            }
        }
    }
}

#[test]
fn buffer_across_two_regions_comes_in_two_spans() {
    let file = file();
    let first = RegionSpec { mmap_offset: 4096, ..region(0, 4096) };
    let second = RegionSpec { mmap_offset: 0, ..region(4096, 4096) };
    let memory = GuestMemory::new().with_region(second, shared(&file)).unwrap().with_region(first, file).unwrap();
    let mut cache = RegionCache::default();
    assert!(memory.translate(&mut cache, 4000, 200).is_none());
    let start = memory.translate_some(&mut cache, 4000, 200).unwrap();
    assert_eq!(bytes(start), expected(4096 + 4000, 96));
    let rest = memory.translate_some(&mut cache, 4096, 104).unwrap();
    assert_eq!(bytes(rest), expected(0, 104));
    assert!(memory.translate_some(&mut cache, 8192, 1).is_none());
}

#[test]
fn a_span_outlives_the_table_that_replaced_its_own() {
    let memory = GuestMemory::allocate(4096).unwrap();
    let held = memory.clone();
    let span = held.translate(&mut RegionCache::default(), 16, 4).unwrap();
    // SAFETY: `held` is alive.
    unsafe { span.write(0, &[1, 2, 3, 4]) };
    let emptied =
        memory.without_region(&RegionSpec { guest_addr: 0, size: 4096, user_addr: 0, mmap_offset: 0 }).unwrap();
    drop(memory);
    assert_eq!(emptied.regions().count(), 0);
    assert_eq!(bytes(span), [1, 2, 3, 4]);
}

#[test]
fn errors_carry_their_values() {
    let file = file();
    let memory = GuestMemory::new().with_region(region(0x1000, 0x1000), shared(&file)).unwrap();
    let refused = |spec| memory.with_region(spec, shared(&file)).unwrap_err();
    assert!(matches!(refused(region(0, 0)), MemoryError::Empty(spec) if spec == region(0, 0)));
    assert!(matches!(
        refused(RegionSpec { user_addr: 0, ..region(0xffff_ffff_ffff_f000, 0x1001) }),
        MemoryError::Overflow { space: AddressSpace::Guest, .. }
    ));
    assert!(matches!(
        refused(RegionSpec { user_addr: 0xffff_ffff_ffff_f000, ..region(0x8000, 0x1001) }),
        MemoryError::Overflow { space: AddressSpace::User, .. }
    ));
    assert!(matches!(
        refused(RegionSpec { user_addr: 0, ..region(0x1ff0, 0x20) }),
        MemoryError::Overlap { space: AddressSpace::Guest, other, .. } if other == region(0x1000, 0x1000)
    ));
    assert!(matches!(
        refused(RegionSpec { user_addr: region(0x1000, 1).user_addr - 0x10, ..region(0, 0x11) }),
        MemoryError::Overlap { space: AddressSpace::User, .. }
    ));
    assert!(matches!(refused(RegionSpec { mmap_offset: 8, ..region(0, 0x10) }), MemoryError::Misaligned(_)));
    let short = refused(RegionSpec { mmap_offset: FILE - 0x10, ..region(0, 0x20) }).to_string();
    assert!(short.contains("0x10000 bytes") && short.contains("0x10010"), "{short}");
    assert!(short.contains("Memory region description"), "{short}");
    assert!(matches!(memory.without_region(&region(0x1000, 0xfff)), Err(MemoryError::NoSuchRegion(_))));
    // None of that changed the table.
    assert_eq!(memory.regions().copied().collect::<Vec<_>>(), [region(0x1000, 0x1000)]);
}

#[test]
fn all_slots_and_no_more() {
    let file = file();
    let mut memory = GuestMemory::new();
    // From the highest down, so that the order is not simply that of arrival.
    for index in (0..MAX_REGIONS as u64).rev() {
        memory = memory
            .with_region(RegionSpec { mmap_offset: index * 16, ..region(index << 20, 4096) }, shared(&file))
            .unwrap();
    }
    assert!(matches!(memory.with_region(region(1 << 40, 4096), file), Err(MemoryError::TooMany(_))));
    let mut cache = RegionCache::default();
    for index in 0..MAX_REGIONS as u64 {
        let span = memory.translate(&mut cache, (index << 20) + 8, 64).unwrap();
        assert_eq!(bytes(span), expected(index * 16 + 8, 64));
        assert!(memory.translate(&mut cache, (index << 20) + 4090, 8).is_none());
    }
}
