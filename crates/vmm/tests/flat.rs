//! Small guests, assembled by hand, on this host's KVM.

mod guest;

use std::sync::Arc;

use guest::{CODE, Guest, Recorder};
use viaduct_vmm::machine::Event;

#[test]
fn port_accesses_of_all_widths_reach_their_device() {
    let guest = Guest::new(&[
        0xBA, 0x10, 0x00, // mov dx, 0x10
        0xB8, 0x34, 0x12, // mov ax, 0x1234
        0xEE, // out dx, al
        0xEF, // out dx, ax
        0x66, 0xB8, 0x78, 0x56, 0x34, 0x12, // mov eax, 0x12345678
        0x66, 0xEF, // out dx, eax
        0xEC, // in al, dx
        0xE6, 0x18, // out 0x18, al
        0xED, // in ax, dx
        0xE7, 0x18, // out 0x18, ax
        0x66, 0xED, // in eax, dx
        0x66, 0xE7, 0x18, // out 0x18, eax
        0xF4, // hlt
    ]);
    let device = Arc::new(Recorder::new("registers"));
    guest.machine.ports().insert(0x10, 16, device.clone()).unwrap();
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    let expected: [(u64, &[u8]); 6] = [
        (0, &[0x34]),
        (0, &[0x34, 0x12]),
        (0, &[0x78, 0x56, 0x34, 0x12]),
        (8, &[0xA0]),
        (8, &[0xA0, 0xA1]),
        (8, &[0xA0, 0xA1, 0xA2, 0xA3]),
    ];
    assert_eq!(device.writes(), expected.map(|(offset, data)| (offset, data.to_vec())));
}

#[test]
fn a_halted_vcpu_goes_on_when_the_machine_is_resumed() {
    let guest = Guest::new(&[0xF4, 0xE6, 0x18, 0xF4]); // hlt; out 0x18, al; hlt
    let device = Arc::new(Recorder::new("registers"));
    guest.machine.ports().insert(0x18, 1, device.clone()).unwrap();
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    assert!(device.writes().is_empty());
    guest.machine.resume().unwrap();
    guest.wait(|event| *event == Event::Halted);
    assert_eq!(device.writes().len(), 1);
    guest.machine.request_pause();
    guest.wait(|event| *event == Event::Paused);
    let rip = guest.machine.with_vcpu(0, |vcpu| Ok(vcpu.registers()?.rip)).unwrap();
    assert_eq!(rip, CODE + 4);
}
