//! The table of memory regions against a list: what a front-end may add, remove and name (vhost-user, "Memory region
//! description").

use std::os::fd::OwnedFd;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_memory::{GuestMemory, RegionCache, RegionSpec};

use crate::guest_memory::file;

const FILE: u64 = 1 << 16;

thread_local!(static BACKING: OwnedFd = file(FILE));

fn number(u: &mut Unstructured) -> Result<u64> {
    Ok(match u.int_in_range(0..=7u8)? {
        0..=3 => u64::from(u.arbitrary::<u8>()?) << 12,
        4 => u64::from(u.arbitrary::<u16>()?),
        5 => (u64::from(u.arbitrary::<u8>()?) << 12).wrapping_neg(),
        6 => u64::MAX - u64::from(u.arbitrary::<u16>()?),
        _ => u.arbitrary()?,
    })
}

fn spec(u: &mut Unstructured) -> Result<RegionSpec> {
    let size = match u.int_in_range(0..=3u8)? {
        0 => number(u)?,
        _ => u64::from(u.int_in_range(1..=16u8)?) << 12,
    };
    Ok(RegionSpec { guest_addr: number(u)?, size, user_addr: number(u)?, mmap_offset: number(u)? })
}

/// Whether `addr .. addr + len` lies in `start .. start + size`, without overflow.
fn inside(start: u64, size: u64, addr: u64, len: u32) -> bool {
    let (start, size, addr, len) = (u128::from(start), u128::from(size), u128::from(addr), u128::from(len));
    addr >= start && addr < start + size && addr + len <= start + size
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    BACKING.with(|backing| play(&mut Unstructured::new(data), backing))
}

fn play(u: &mut Unstructured, backing: &OwnedFd) -> Result<()> {
    let mut memory = GuestMemory::new();
    let mut list: Vec<RegionSpec> = Vec::new();
    let mut cache = RegionCache::default();
    let mut asked = 0;
    while !u.is_empty() && asked < 200 {
        asked += 1;
        match u.int_in_range(0..=7u8)? {
            0 | 1 => {
                let spec = spec(u)?;
                if let Ok(larger) = memory.with_region(spec, backing.try_clone().expect("a descriptor")) {
                    let end = |start: u64| u128::from(start) + u128::from(spec.size);
                    assert!(spec.size > 0 && end(spec.mmap_offset) <= u128::from(FILE));
                    assert!(end(spec.guest_addr) <= 1 << 64 && end(spec.user_addr) <= 1 << 64);
                    memory = larger;
                    list.push(spec);
                }
            }
            2 => {
                let spec = match list.get(u.int_in_range(0..=7usize)?) {
                    Some(spec) => *spec,
                    None => spec(u)?,
                };
                let at = list.iter().position(|other| {
                    (other.guest_addr, other.size, other.user_addr) == (spec.guest_addr, spec.size, spec.user_addr)
                });
                match (memory.without_region(&spec), at) {
                    (Ok(smaller), Some(at)) => {
                        memory = smaller;
                        list.swap_remove(at);
                    }
                    (Err(_), None) => {}
                    (found, listed) => panic!("removing {spec}: {found:?}, listed at {listed:?}"),
                }
            }
            3..=5 => {
                let (addr, len) = (number(u)?, u32::from(u.arbitrary::<u16>()?));
                let expected = list.iter().find(|spec| inside(spec.guest_addr, spec.size, addr, len));
                assert_eq!(memory.translate(&mut cache, addr, len).is_some(), expected.is_some(), "{addr:#x} {len:#x}");
                if let Some(span) = memory.translate_some(&mut cache, addr, len.max(1)) {
                    let home = list.iter().find(|spec| inside(spec.guest_addr, spec.size, addr, span.len()));
                    assert!(home.is_some() && !span.is_empty() && span.len() <= len.max(1));
                }
            }
            _ => {
                let (addr, len) = (number(u)?, u32::from(u.arbitrary::<u16>()?));
                let expected = list.iter().find(|spec| inside(spec.user_addr, spec.size, addr, len));
                let found = memory.translate_user(addr, len);
                assert_eq!(found.is_some(), expected.is_some(), "{addr:#x} {len:#x}");
                if let Some(span) = found.filter(|span| !span.is_empty()) {
                    let mut byte = [0];
                    // SAFETY: the memory is alive; were the span not inside, this would crash.
                    unsafe { span.read(span.len() - 1, &mut byte) };
                }
            }
        }
    }
    let mut listed: Vec<_> = list.iter().map(|spec| spec.guest_addr).collect();
    listed.sort_unstable();
    assert!(memory.regions().map(|spec| spec.guest_addr).eq(listed), "regions are in order");
    Ok(())
}
