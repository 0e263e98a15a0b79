//! Nothing stays behind: descriptors and mappings are counted before and after. One test, because the counts are the
//! whole process's.

use std::os::fd::AsFd;

use viaduct_memory::{GuestMemory, MAX_REGIONS, RegionCache, RegionSpec, memfd};

/// Open descriptors, without the one of the directory itself, and mappings of our files.
fn held() -> (usize, usize) {
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count() - 1;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (files, maps.lines().filter(|line| line.contains("memfd:viaduct")).count())
}

#[test]
fn descriptors_and_mappings_come_back() {
    // What the process allocates once (the handler's table) is not counted.
    drop(GuestMemory::allocate(4096).unwrap());
    let before = held();
    assert_eq!(before.1, 0);
    for _ in 0..3 {
        let file = memfd(1 << 20).unwrap();
        let mut memory = GuestMemory::new();
        let mut kept = Vec::new();
        for index in 0..MAX_REGIONS as u64 {
            let spec =
                RegionSpec { guest_addr: index << 16, size: 4096, user_addr: index << 16, mmap_offset: index * 16 };
            memory = memory.with_region(spec, file.as_fd().try_clone_to_owned().unwrap()).unwrap();
            // Refused, after and before mapping: neither may keep the descriptor.
            assert!(memory.with_region(spec, file.as_fd().try_clone_to_owned().unwrap()).is_err());
            let long = RegionSpec { guest_addr: 1 << 40, user_addr: 1 << 40, size: 2 << 20, mmap_offset: 0 };
            assert!(memory.with_region(long, file.as_fd().try_clone_to_owned().unwrap()).is_err());
            kept.push(memory.clone());
        }
        drop(file);
        // All tables share the mappings, and none holds a descriptor.
        assert_eq!(held(), (before.0, MAX_REGIONS));
        drop(memory);
        let last = kept.pop().unwrap();
        let first = kept.swap_remove(0);
        drop(kept);
        assert_eq!(held(), (before.0, MAX_REGIONS));
        drop(last);
        assert_eq!(held(), (before.0, 1));
        assert!(first.translate(&mut RegionCache::default(), 0, 4096).is_some());
        drop(first);
        assert_eq!(held(), before);
    }
}
