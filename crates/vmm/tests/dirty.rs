//! Which pages a guest has written: exactly those, by bitmaps and by rings.

mod guest;

use guest::Guest;
use viaduct_memory::RegionSpec;
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

#[test]
fn a_full_ring_loses_no_page() {
    let code = [
        0xF4, // hlt
        0xB8, 0x00, 0x00, 0x10, 0x00, // mov eax, 0x100000
        0x88, 0x00, // mov [eax], al
        0x05, 0x00, 0x10, 0x00, 0x00, // add eax, 0x1000
        0x3D, 0x00, 0x00, 0x30, 0x00, // cmp eax, 0x300000
        0x75, 0xF2, // jne to mov [eax], al
        0xF4, // hlt
    ];
    // 512 pages, twice as many as the ring has entries.
    let guest = Guest::with(&code, Options { vcpus: 1, interrupts: Interrupts::None, dirty_ring: Some(256) });
    let more = RegionSpec { guest_addr: 1 << 20, size: 2 << 20, user_addr: 1 << 20, mmap_offset: 0 };
    let memory = guest.memory.with_region(more, viaduct_memory::memfd(2 << 20).unwrap()).unwrap();
    guest.machine.owned().set_memory(&memory).unwrap();
    guest.protected();
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    guest.machine.owned().log_dirty_pages(true).unwrap();
    guest.machine.resume().unwrap();
    guest.wait(|event| *event == Event::Halted);
    let regions = guest.machine.owned().take_dirty_pages().unwrap();
    let pages: Vec<_> = regions.iter().flat_map(|region| region.addresses()).collect();
    let all: Vec<_> = (0x10_0000..0x30_0000).step_by(4096).collect();
    assert_eq!(pages, all);
    let counts = guest.machine.exits(0).unwrap().counts();
    assert!(counts.iter().any(|count| count.reason == Reason::Interrupted), "the ring was full: {counts:?}");
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
