//! Which pages a guest has written: exactly those, by bitmaps and by rings.

mod guest;

use guest::Guest;
use viaduct_vmm::engine::Interrupts;
use viaduct_vmm::engine::kvm::Options;
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
fn rings_that_cannot_be_are_refused() {
    let memory = viaduct_memory::GuestMemory::allocate(guest::MEMORY).unwrap();
    for entries in [0, 1000, 1 << 31] {
        let options = Options { vcpus: 1, interrupts: Interrupts::None, dirty_ring: Some(entries) };
        let error = viaduct_vmm::engine::kvm::create(&memory, options).err().unwrap();
        assert!(error.to_string().contains("power of two"), "{error}");
    }
}
