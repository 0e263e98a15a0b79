//! Translations of an IOMMU against a model that keeps one entry for each byte, and memory behind them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use proptest::prelude::*;
use viaduct_memory::iotlb::{Access, Iotlb, IotlbError, MAX_RANGES, MAX_WAITING, Miss, PAGE, Translation, Unreachable};
use viaduct_memory::{GuestMemory, RegionCache, RegionSpec, memfd};

const REGION: u64 = 16 * PAGE;
const USER: u64 = 0x7f00_0000_0000;

fn event() -> OwnedFd {
    // SAFETY: a fresh descriptor, checked.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

fn iotlb() -> Arc<Iotlb> {
    Arc::new(Iotlb::new(event()))
}

/// Two regions with a hole between them in both spaces; the first bytes of their pages are their page numbers.
fn memory() -> GuestMemory {
    let mut memory = GuestMemory::new();
    for index in 0..2 {
        let file = memfd(REGION).expect("memory");
        let start = index * 4 * REGION;
        let spec = RegionSpec { guest_addr: start, size: REGION, user_addr: USER + start, mmap_offset: 0 };
        memory = memory.with_region(spec, file).expect("a legal region");
        for page in 0..REGION / PAGE {
            let span = memory.translate_user(USER + start + page * PAGE, 8).expect("inside");
            // SAFETY: `memory` is alive.
            unsafe { span.write(0, &(start / PAGE + page).to_le_bytes()) };
        }
    }
    memory
}

fn map(iotlb: &Iotlb, iova: u64, size: u64, user: u64, permissions: u8) -> Option<(u64, u64)> {
    iotlb.update(Translation::new(iova, size, user, permissions).expect("a legal translation"))
}

fn reach(memory: &GuestMemory, addr: u64, len: u32, access: Access) -> Result<(u64, u32), Unreachable> {
    let span = memory.reach(&mut RegionCache::default(), addr, len, access)?;
    let mut bytes = [0; 8];
    // SAFETY: `memory` is alive; spans of these tests have at least 8 bytes.
    unsafe { span.read(0, &mut bytes) };
    Ok((u64::from_le_bytes(bytes), span.len()))
}

#[test]
fn nothing_is_joined_beyond_the_last_address() {
    let iotlb = iotlb();
    assert_eq!(map(&iotlb, 0, PAGE, u64::MAX - PAGE + 1, 3), None);
    assert_eq!(map(&iotlb, PAGE, PAGE, 0, 3), None);
    let found = iotlb.translations();
    assert_eq!(found.len(), 2, "{found:?}");
    // As another process would be told of them.
    for range in found {
        assert!(Translation::new(range.iova, range.last - range.iova + 1, range.user_addr, 3).is_ok(), "{range:?}");
    }
}

#[test]
fn what_is_not_mapped_is_asked_for_once() {
    let (iotlb, memory) = (iotlb(), memory());
    let translated = memory.behind(iotlb.clone());
    let miss = Miss { iova: 0x5000, access: Access::Read };
    assert_eq!(reach(&translated, 0x5010, 8, Access::Read), Err(Unreachable::Missing(miss)));
    assert!(iotlb.take_misses().is_empty(), "looking up asks for nothing");
    iotlb.request(miss);
    iotlb.request(miss);
    assert_eq!(iotlb.take_misses(), [miss]);
    assert!(iotlb.is_waiting(miss));
    map(&iotlb, 0x5000, PAGE, USER + 3 * PAGE, 1);
    assert!(!iotlb.is_waiting(miss));
    assert_eq!(reach(&translated, 0x5000, 100, Access::Read), Ok((3, 100)));
    assert_eq!(iotlb.stats().misses, 1);
}

#[test]
fn guest_physical_addresses_mean_nothing_behind_an_iommu() {
    let translated = memory().behind(iotlb());
    let mut cache = RegionCache::default();
    assert!(translated.translate(&mut cache, 0, 8).is_none());
    assert!(translated.translate_some(&mut cache, 0, 8).is_none());
    assert!(translated.window(&cache).span(0, 8).is_none());
    map(translated.iotlb().expect("there"), 0, REGION, USER, 3);
    assert!(translated.reach(&mut cache, 0, 8, Access::Read).is_ok());
    assert!(translated.translate(&mut cache, 0, 8).is_none(), "not by way of the cache either");
    assert!(translated.window(&cache).span(0, 8).is_none());
}

#[test]
fn permissions_are_enforced_and_reported() {
    let (iotlb, memory) = (iotlb(), memory());
    let translated = memory.behind(iotlb.clone());
    map(&iotlb, 0, PAGE, USER, 1);
    map(&iotlb, PAGE, PAGE, USER + PAGE, 2);
    map(&iotlb, 2 * PAGE, PAGE, USER + 2 * PAGE, 3);
    let mut cache = RegionCache::default();
    let mut allowed = |page: u64, access| translated.reach(&mut cache, page * PAGE, 8, access).map(|_| ());
    for (page, access, expected) in [
        (0, Access::Read, Ok(())),
        (0, Access::Write, Err(Unreachable::Forbidden)),
        (1, Access::Write, Ok(())),
        (1, Access::Read, Err(Unreachable::Forbidden)),
        (2, Access::Read, Ok(())),
        (2, Access::Write, Ok(())),
    ] {
        assert_eq!(allowed(page, access), expected, "page {page}, {access:?}");
    }
    assert_eq!(
        iotlb.take_forbidden(),
        [Miss { iova: 0, access: Access::Write }, Miss { iova: PAGE, access: Access::Read }]
    );
}

#[test]
fn a_translation_that_leads_outside_the_memory_is_forbidden() {
    let (iotlb, memory) = (iotlb(), memory());
    let translated = memory.behind(iotlb.clone());
    map(&iotlb, 0, 4 * REGION, USER, 3);
    assert_eq!(reach(&translated, REGION - 8, 100, Access::Read), Ok((0, 8)), "ends with the region");
    assert_eq!(reach(&translated, REGION, 8, Access::Read), Err(Unreachable::Forbidden));
    let spec = *memory.regions().next().expect("two");
    let smaller = memory.without_region(&spec).expect("there").behind(iotlb.clone());
    assert_eq!(reach(&smaller, 0, 8, Access::Read), Err(Unreachable::Forbidden), "the region has gone");
}

#[test]
fn a_cache_does_not_outlive_an_invalidation() {
    let (iotlb, memory) = (iotlb(), memory());
    let translated = memory.behind(iotlb.clone());
    let mut cache = RegionCache::default();
    map(&iotlb, 0, 4 * PAGE, USER, 3);
    assert!(translated.reach(&mut cache, PAGE, 8, Access::Read).is_ok());
    iotlb.invalidate(0, PAGE - 1);
    assert!(translated.reach(&mut cache, PAGE, 8, Access::Read).is_ok(), "the rest stays");
    let gone = Unreachable::Missing(Miss { iova: 0, access: Access::Read });
    assert_eq!(translated.reach(&mut cache, 0, 8, Access::Read).map(|_| ()), Err(gone));
}

#[test]
fn a_refusal_holds_until_those_who_wait_were_told() {
    let (iotlb, memory) = (iotlb(), memory());
    let translated = memory.behind(iotlb.clone());
    let miss = Miss { iova: PAGE, access: Access::Write };
    assert!(!iotlb.refuse(miss), "nobody had asked");
    iotlb.request(miss);
    assert!(iotlb.refuse(miss));
    assert!(iotlb.is_refused(miss) && !iotlb.is_waiting(miss));
    let mut cache = RegionCache::default();
    let mut write = |refused| {
        cache.set_refused(refused);
        translated.reach(&mut cache, PAGE + 9, 8, Access::Write).map(|_| ())
    };
    assert_eq!(write(None), Err(Unreachable::Missing(miss)));
    assert_eq!(write(Some(miss)), Err(Unreachable::Refused), "for the queue that waited");
    let part = |iotlb: &Iotlb| (translated.ring_part(PAGE, 8, &[Access::Write]).map(|_| ()), iotlb.is_waiting(miss));
    assert_eq!(part(&iotlb), (Err(Unreachable::Refused), false), "and not asked for again");
    iotlb.forget_refusals();
    assert_eq!(part(&iotlb), (Err(Unreachable::Missing(miss)), true));
    map(&iotlb, 0, 2 * PAGE, USER, 3);
    assert_eq!(write(Some(miss)), Ok(()), "an update overrules it");
    assert_eq!(part(&iotlb), (Ok(()), false));
}

#[test]
fn what_has_come_meanwhile_is_not_asked_for() {
    let iotlb = iotlb();
    map(&iotlb, 0, PAGE, USER, 1);
    iotlb.request(Miss { iova: 0, access: Access::Read });
    assert!(iotlb.take_misses().is_empty());
}

#[test]
fn a_flood_of_misses_is_bounded() {
    let iotlb = iotlb();
    for page in 0..10 * MAX_WAITING as u64 {
        iotlb.request(Miss { iova: page * PAGE, access: Access::Read });
    }
    let taken = iotlb.take_misses();
    assert_eq!(taken.len(), MAX_WAITING);
    for miss in taken {
        assert!(iotlb.refuse(miss));
    }
    iotlb.request(Miss { iova: 0, access: Access::Read });
    assert_eq!(iotlb.take_misses().len(), 1, "there is room again");
}

#[test]
fn a_full_table_is_emptied() {
    let iotlb = iotlb();
    // Every other page, so that none join.
    for page in 0..MAX_RANGES as u64 {
        assert_eq!(map(&iotlb, 2 * page * PAGE, PAGE, USER, 3), None);
    }
    assert_eq!(iotlb.stats().ranges, MAX_RANGES as u64);
    assert_eq!(map(&iotlb, PAGE, PAGE, USER, 3), Some((0, u64::MAX)));
    assert_eq!(iotlb.stats().ranges, 1);
}

#[test]
fn adjacent_pages_become_one_range() {
    let iotlb = iotlb();
    for page in [3, 1, 2, 0] {
        map(&iotlb, page * PAGE, PAGE, USER + page * PAGE, 3);
    }
    assert_eq!(iotlb.translations(), [Translation::new(0, 4 * PAGE, USER, 3).expect("legal")]);
    map(&iotlb, 4 * PAGE, PAGE, USER + 4 * PAGE, 1);
    map(&iotlb, 5 * PAGE, PAGE, USER, 1);
    assert_eq!(iotlb.stats().ranges, 3, "other permissions, and another place");
}

#[test]
fn the_whole_space_is_a_range() {
    let iotlb = iotlb();
    map(&iotlb, 0, u64::MAX, 0, 3);
    map(&iotlb, u64::MAX, 1, u64::MAX, 3);
    assert_eq!(iotlb.stats().ranges, 1);
    iotlb.invalidate(u64::MAX, u64::MAX);
    assert_eq!(iotlb.translations(), [Translation::new(0, u64::MAX, 0, 3).expect("legal")]);
    iotlb.invalidate(0, u64::MAX);
    assert_eq!(iotlb.translations(), []);
}

#[test]
fn impossible_translations_are_refused() {
    let range = |iova, size, user_addr| IotlbError::Range { iova, size, user_addr };
    assert_eq!(Translation::new(0, 0, 0, 3), Err(range(0, 0, 0)));
    assert_eq!(Translation::new(2, u64::MAX, 0, 3), Err(range(2, u64::MAX, 0)));
    assert_eq!(Translation::new(0, 2, u64::MAX, 3), Err(range(0, 2, u64::MAX)));
    assert_eq!(Translation::new(0, 1, 0, 0), Err(IotlbError::Permissions(0)));
    assert_eq!(Translation::new(0, 1, 0, 4), Err(IotlbError::Permissions(4)));
}

#[test]
fn control_is_told_through_the_eventfd() {
    use std::io::Read;
    let signal = event();
    let mut watched = File::from(signal.try_clone().expect("a copy"));
    let iotlb = Iotlb::new(signal);
    let mut count = [0; 8];
    assert!(watched.read(&mut count).is_err(), "nothing yet");
    iotlb.request(Miss { iova: 0, access: Access::Read });
    assert_eq!(watched.read(&mut count).expect("told"), 8);
}

#[test]
fn a_ring_over_scattered_pages_lies_in_one_piece() {
    let (iotlb, memory) = (iotlb(), memory());
    let translated = memory.behind(iotlb.clone());
    let both = [Access::Read, Access::Write];
    let start = 0x10_0000;
    let missing = translated.ring_part(start + 64, 3 * PAGE as u32, &both).map(|_| ());
    assert_eq!(missing, Err(Unreachable::Missing(Miss { iova: start, access: Access::Read })));
    assert_eq!(iotlb.take_misses().len(), 4, "all of its pages are asked for");
    // Backwards, and the last page from the other region.
    for (page, from) in [(0, 9), (1, 8), (2, 7), (3, 4 * REGION / PAGE + 2)] {
        map(&iotlb, start + page * PAGE, PAGE, USER + from * PAGE, 3);
    }
    let part = translated.ring_part(start + 64, 3 * PAGE as u32, &both).expect("all there");
    assert!(part.is_mapped_anew());
    assert_eq!(part.as_ptr() as u64 % PAGE, 64);
    for (page, from) in [(1, 8), (2, 7), (3, 4 * REGION / PAGE + 2)] {
        let at = part.as_ptr().wrapping_add((page * PAGE - 64) as usize).cast::<u64>();
        // SAFETY: inside the part, which is alive.
        unsafe {
            assert_eq!(at.read_volatile().to_le(), from);
            at.add(1).write_volatile(1000 + page);
        }
        let span = memory.translate_user(USER + from * PAGE, 16).expect("inside");
        let mut bytes = [0; 8];
        // SAFETY: `memory` is alive.
        unsafe { span.read(8, &mut bytes) };
        assert_eq!(u64::from_le_bytes(bytes), 1000 + page, "the same memory");
    }
    let whole = translated.ring_part(start + PAGE, PAGE as u32, &both).expect("all there");
    assert!(!whole.is_mapped_anew());
    map(&iotlb, start + PAGE, PAGE, USER, 1);
    assert_eq!(translated.ring_part(start + 64, 3 * PAGE as u32, &both).map(|_| ()), Err(Unreachable::Forbidden));
}

/// What an operation of the property test does, in units that make ranges meet often.
#[derive(Clone, Copy, Debug)]
enum Act {
    Update { at: u64, size: u64, user: u64, permissions: u8 },
    Invalidate { at: u64, size: u64 },
}

const UNIT: u64 = 0x10;

fn act() -> impl Strategy<Value = Act> {
    let update = (0..60u64, 1..20u64, 0..4u64, 1..4u8);
    prop_oneof![
        3 => update.prop_map(|(at, size, user, permissions)| Act::Update { at, size, user: 64 * user, permissions }),
        2 => (0..60u64, 1..30u64).prop_map(|(at, size)| Act::Invalidate { at, size }),
    ]
}

proptest! {
    #[test]
    fn it_agrees_with_a_table_of_single_units(acts in prop::collection::vec(act(), 1..60)) {
        let iotlb = iotlb();
        let mut model: BTreeMap<u64, (u64, u8)> = BTreeMap::new();
        for act in acts {
            let before = model.clone();
            let removals = iotlb.removals();
            match act {
                Act::Update { at, size, user, permissions } => {
                    // The same place in the other space for the same address, so that ranges can join.
                    let stale = map(&iotlb, at * UNIT, size * UNIT, (user + at) * UNIT, permissions);
                    for unit in at..at + size {
                        model.insert(unit, (user + unit, permissions));
                    }
                    let changed = before.iter().any(|(unit, old)| model[unit] != *old);
                    prop_assert_eq!(stale, changed.then_some((at * UNIT, (at + size) * UNIT - 1)));
                }
                Act::Invalidate { at, size } => {
                    iotlb.invalidate(at * UNIT, (at + size) * UNIT - 1);
                    model.retain(|unit, _| !(at..at + size).contains(unit));
                }
            }
            let lost = before.iter().any(|(unit, old)| model.get(unit) != Some(old));
            prop_assert!(!lost || iotlb.removals() > removals, "caches have to notice");
            let found = iotlb.translations();
            prop_assert!(found.windows(2).all(|pair| pair[0].last < pair[1].iova), "{:?}", found);
            let mut units = BTreeMap::new();
            for range in &found {
                for (step, unit) in (range.iova / UNIT..=range.last / UNIT).enumerate() {
                    let allowed = [Access::Read, Access::Write].map(|access| range.permissions.allow(access));
                    let permissions = u8::from(allowed[0]) | u8::from(allowed[1]) << 1;
                    units.insert(unit, (range.user_addr / UNIT + step as u64, permissions));
                }
            }
            prop_assert_eq!(&units, &model);
        }
    }
}
