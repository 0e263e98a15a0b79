//! Which pages a guest has written: exactly those, by bitmaps and by rings.

mod guest;

use std::collections::BTreeSet;

use guest::{Guest, byte};
use viaduct_memory::{GuestMemory, RegionSpec};
use viaduct_vmm::engine::Interrupts;
use viaduct_vmm::engine::kvm::Options;
use viaduct_vmm::exits::Reason;
use viaduct_vmm::machine::Event;

fn written(guest: &Guest) -> Vec<u64> {
    let regions = guest.machine.owned().take_dirty_pages().unwrap();
    assert_eq!(regions.len(), 1);
    assert_eq!(regions[0].base, 0);
    regions[0].addresses().map(|address| address / 4096).collect()
}

/// Halts, then writes to page 0x20 and page 0x23, and halts again.
const TWO_PAGES: &[u8] = &[
    0xF4, // hlt
    0xB8, 0x00, 0x20, 0x8E, 0xD8, // mov ax, 0x2000; mov ds, ax
    0xA2, 0x00, 0x00, // mov [0], al
    0xA2, 0xFF, 0x3F, // mov [0x3FFF], al
    0xF4, // hlt
];

#[test]
fn exactly_the_written_pages_are_told() {
    for dirty_ring in [None, Some(1024)] {
        let guest = Guest::with(TWO_PAGES, Options { vcpus: 1, interrupts: Interrupts::None, dirty_ring });
        let error = guest.machine.owned().take_dirty_pages().unwrap_err();
        assert!(error.to_string().contains("nobody has asked"), "{error}");
        guest.machine.start().unwrap();
        guest.wait(|event| *event == Event::Halted);
        guest.machine.owned().log_dirty_pages(true).unwrap();
        assert!(written(&guest).is_empty());
        guest.machine.resume().unwrap();
        guest.wait(|event| *event == Event::Halted);
        assert_eq!(written(&guest), [0x20, 0x23], "{dirty_ring:?}");
        assert!(written(&guest).is_empty(), "each is told once");
        guest.machine.owned().log_dirty_pages(false).unwrap();
        assert!(guest.machine.owned().take_dirty_pages().is_err());
    }
}

/// Writes to `pages` pages from 1 MiB on; if `leaves`, with a port access behind each.
fn writes_pages(pages: u32, leaves: bool) -> Vec<u8> {
    let end = 0x10_0000 + pages * 4096;
    let mut code = vec![
        0xF4, // hlt
        0xB8, 0x00, 0x00, 0x10, 0x00, // mov eax, 0x100000
        0xC6, 0x00, 0xFF, // mov byte [eax], 0xFF
        0x05, 0x00, 0x10, 0x00, 0x00, // add eax, 0x1000
    ];
    // out 0x18, al
    code.extend(if leaves { &[0xE6, 0x18][..] } else { &[] });
    code.push(0x3D); // cmp eax, end
    code.extend(end.to_le_bytes());
    // jne to the write
    code.extend(if leaves { [0x75, 0xEF] } else { [0x75, 0xF1] });
    code.push(0xF4); // hlt
    code
}

/// A guest with a ring of 256 entries and 512 pages from 1 MiB on, before it writes to them.
fn with_512_pages(code: &[u8]) -> (Guest, GuestMemory) {
    let guest = Guest::with(code, Options { vcpus: 1, interrupts: Interrupts::None, dirty_ring: Some(256) });
    let more = RegionSpec { guest_addr: 1 << 20, size: 2 << 20, user_addr: 1 << 20, mmap_offset: 0 };
    let memory = guest.memory.with_region(more, viaduct_memory::memfd(2 << 20).unwrap()).unwrap();
    guest.machine.owned().set_memory(&memory).unwrap();
    guest.protected();
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    guest.machine.owned().log_dirty_pages(true).unwrap();
    guest.machine.resume().unwrap();
    (guest, memory)
}

/// The guest leaves often enough for a KVM that emulates to see in time that the ring is full.
#[test]
fn a_full_ring_loses_no_page() {
    let (guest, _) = with_512_pages(&writes_pages(512, true));
    guest.wait(|event| *event == Event::Halted);
    let regions = guest.machine.owned().take_dirty_pages().unwrap();
    let pages: Vec<_> = regions.iter().flat_map(|region| region.addresses()).collect();
    let all: Vec<_> = (0x10_0000..0x30_0000).step_by(4096).collect();
    assert_eq!(pages, all);
    let counts = guest.machine.exits(0).unwrap().counts();
    assert!(counts.iter().any(|count| count.reason == Reason::Interrupted), "the ring was full: {counts:?}");
}

/// Where KVM emulates it may write more entries than the ring has. Then it must be said, and no page may be missing.
#[test]
fn a_ring_that_overflows_is_not_believed() {
    let (guest, memory) = with_512_pages(&writes_pages(512, false));
    let event = guest.wait(|event| matches!(event, Event::Halted | Event::Failed { .. }));
    if let Event::Failed { reason, .. } = &event {
        assert!(reason.contains("log by bitmaps"), "{reason}");
    }
    let regions = guest.machine.owned().take_dirty_pages().unwrap();
    let pages: BTreeSet<_> = regions.iter().flat_map(|region| region.addresses()).collect();
    let written = (0x10_0000..0x30_0000).step_by(4096).filter(|&page| byte(&memory, page) != 0);
    let missing: Vec<_> = written.filter(|page| !pages.contains(page)).collect();
    assert!(missing.is_empty(), "{missing:x?} after {event:x?}");
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let memory = viaduct_memory::GuestMemory::allocate(guest::MEMORY).unwrap();
    for entries in [0, 1000, 1 << 31] {
        let options = Options { vcpus: 1, interrupts: Interrupts::None, dirty_ring: Some(entries) };
        let error = viaduct_vmm::engine::kvm::create(&memory, options).err().unwrap();
        assert!(error.to_string().contains("power of two"), "{error}");
    }
}
