//! Interrupts that reach guest code, from pins, eventfds and messages, with all controllers in the kernel and with the
//! IOAPIC in this process; and eventfds that guest code signals.

mod guest;

use std::sync::Arc;

use guest::{CODE, Guest, Recorder, until, write};
use viaduct_vmm::engine::kvm::Options;
use viaduct_vmm::engine::{Doorbell, Interrupts, Msi};
use viaduct_vmm::machine::Event;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const HANDLER: u32 = 0x2000;
const VECTOR: u8 = 0x41;

/// Protected mode: masks the PICs, which are asked first, and switches the local APIC on.
const APIC_ON: &[u8] = &[
    0xB0, 0xFF, 0xE6, 0x21, 0xE6, 0xA1, // mov al, 0xFF; out 0x21, al; out 0xA1, al
    0xC7, 0x05, 0xF0, 0x00, 0xE0, 0xFE, 0xFF, 0x01, 0x00, 0x00, // mov dword [0xFEE000F0], 0x1FF
];
/// Writes 1 to port 0x18, and waits with interrupts on.
const READY_AND_WAIT: &[u8] = &[
    0xB0, 0x01, 0xE6, 0x18, // mov al, 1; out 0x18, al
    0xFB, // sti
    0xF4, 0xEB, 0xFD, // hlt; jmp to it
];
/// Handles an interrupt: writes 2 to port 0x18, ends the interrupt at the local APIC, and waits for the next one. It does
/// not return, because a KVM that emulates protected mode cannot execute IRET there.
const HANDLE: &[u8] = &[
    0xB0, 0x02, 0xE6, 0x18, // mov al, 2; out 0x18, al
    0xC7, 0x05, 0xB0, 0x00, 0xE0, 0xFE, 0x00, 0x00, 0x00, 0x00, // mov dword [0xFEE000B0], 0
    0xBC, 0x00, 0x10, 0x00, 0x00, // mov esp, 0x1000
    0xFB, 0xF4, 0xEB, 0xFD, // sti; hlt; jmp to it
];
/// The same with 3, for a vector of a lower priority (Intel SDM 3, 11.8.3.1).
const LESS_URGENT: u8 = 0x31;
const HANDLE_LESS_URGENT: &[u8] = &[
    0xB0, 0x03, 0xE6, 0x18, // mov al, 3; out 0x18, al
    0xC7, 0x05, 0xB0, 0x00, 0xE0, 0xFE, 0x00, 0x00, 0x00, 0x00, // mov dword [0xFEE000B0], 0
    0xBC, 0x00, 0x10, 0x00, 0x00, // mov esp, 0x1000
    0xFB, 0xF4, 0xEB, 0xFD, // sti; hlt; jmp to it
];

/// Protected mode: writes to the IOAPIC's register `select`.
fn ioapic_write(select: u8, value: u32) -> Vec<u8> {
    let mut code = vec![0xC7, 0x05, 0x00, 0x00, 0xC0, 0xFE]; // mov dword [0xFEC00000], select
    code.extend(u32::from(select).to_le_bytes());
    code.extend([0xC7, 0x05, 0x10, 0x00, 0xC0, 0xFE]); // mov dword [0xFEC00010], value
    code.extend(value.to_le_bytes());
    code
}

struct Started {
    guest: Guest,
    device: Arc<Recorder>,
}

impl Started {
    /// A guest that handles `VECTOR`, ready for it, after code that prepares more.
    fn new(interrupts: Interrupts, prepare: &[u8]) -> Started {
        let code = [APIC_ON, prepare, READY_AND_WAIT].concat();
        let guest = Guest::with(&code, Options { vcpus: 1, interrupts, dirty_ring: None });
        guest.protected();
        guest.set_handler(VECTOR, HANDLER, HANDLE);
        let device = Arc::new(Recorder::new("interrupted"));
        guest.machine.ports().insert(0x18, 1, device.clone()).unwrap();
        guest.machine.start().unwrap();
        let started = Started { guest, device };
        until(|| started.count(1) == 1);
        started
    }

    fn count(&self, value: u8) -> usize {
        self.device.writes().iter().filter(|(_, data)| data[..] == [value]).count()
    }

    fn interrupted(&self, times: usize) {
        until(|| self.count(2) >= times);
        assert_eq!(self.count(2), times);
    }
}

const MESSAGE: Msi = Msi { address: 0xFEE0_0000, data: VECTOR as u32 };

#[test]
fn a_message_interrupts_the_guest() {
    for interrupts in [Interrupts::Engine, Interrupts::Split] {
        let started = Started::new(interrupts, &[]);
        for times in 1..=10 {
            started.guest.machine.vm().signal_msi(MESSAGE).unwrap();
            started.interrupted(times);
        }
    }
}

#[test]
fn an_eventfd_sends_the_message_that_is_set() {
    for interrupts in [Interrupts::Engine, Interrupts::Split] {
        let started = Started::new(interrupts, &[]);
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let route = started.guest.machine.vm().attach_msi(&event).unwrap();
        event.write(1).unwrap();
        assert_eq!(started.count(2), 0, "no message is set");
        route.set(Some(MESSAGE)).unwrap();
        started.interrupted(1);
        event.write(1).unwrap();
        started.interrupted(2);
        // Taken away, it stays in the event; put back, it is sent.
        route.set(None).unwrap();
        event.write(1).unwrap();
        route.set(Some(MESSAGE)).unwrap();
        started.interrupted(3);
        drop(route);
        event.write(1).unwrap();
        assert_eq!(event.read().unwrap(), 1, "nobody listens any more");
        assert_eq!(started.count(2), 3);
    }
}

#[test]
fn many_messages_have_routes_of_their_own() {
    let started = Started::new(Interrupts::Engine, &[]);
    let vm = started.guest.machine.vm();
    let events: Vec<_> = (0..200).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    let routes: Vec<_> = events.iter().map(|event| vm.attach_msi(event).unwrap()).collect();
    routes.iter().for_each(|route| route.set(Some(MESSAGE)).unwrap());
    for (index, event) in events.iter().enumerate().step_by(50) {
        event.write(1).unwrap();
        started.interrupted(index / 50 + 1);
    }
}

#[test]
fn a_pin_interrupts_the_guest_through_the_ioapic() {
    for interrupts in [Interrupts::Engine, Interrupts::Split] {
        let prepare = [ioapic_write(0x10 + 2 * 5 + 1, 0), ioapic_write(0x10 + 2 * 5, VECTOR.into())].concat();
        let started = Started::new(interrupts, &prepare);
        let vm = started.guest.machine.vm();
        for times in 1..=5 {
            vm.set_line(5, true).unwrap();
            vm.set_line(5, false).unwrap();
            started.interrupted(times);
        }
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let attached = vm.attach_line(5, &event).unwrap();
        event.write(1).unwrap();
        started.interrupted(6);
        drop(attached);
    }
}

#[test]
fn a_level_triggered_pin_interrupts_until_it_is_low() {
    for interrupts in [Interrupts::Engine, Interrupts::Split] {
        let level = 1 << 15 | u32::from(VECTOR);
        let prepare = [ioapic_write(0x10 + 2 * 9 + 1, 0), ioapic_write(0x10 + 2 * 9, level)].concat();
        let started = Started::new(interrupts, &prepare);
        started.guest.set_handler(LESS_URGENT, HANDLER + 0x100, HANDLE_LESS_URGENT);
        let vm = started.guest.machine.vm();
        // Delivered as soon as nothing more urgent waits: never, as long as the pin interrupts again and again.
        let at_rest = |times: usize| {
            vm.signal_msi(Msi { data: LESS_URGENT.into(), ..MESSAGE }).unwrap();
            until(|| started.count(3) == times);
            started.count(2)
        };
        vm.set_line(9, true).unwrap();
        until(|| started.count(2) >= 3);
        vm.set_line(9, false).unwrap();
        // One more may have been on its way, and none comes after it.
        let before = at_rest(1);
        assert_eq!(at_rest(2), before, "{interrupts:?}");
        vm.set_line(9, true).unwrap();
        until(|| started.count(2) > before);
        vm.set_line(9, false).unwrap();
    }
}

#[test]
fn the_pics_interrupt_a_guest_in_real_mode() {
    let code = [
        0xB0, 0x11, 0xE6, 0x20, // mov al, 0x11; out 0x20, al: begin, in cascade, four words
        0xB0, 0x08, 0xE6, 0x21, // vectors from 8
        0xB0, 0x04, 0xE6, 0x21, // the second one is at input 2
        0xB0, 0x01, 0xE6, 0x21, // 8086 mode
        0xB0, 0xDF, 0xE6, 0x21, // all masked but 5
        0xB0, 0x01, 0xE6, 0x18, // mov al, 1; out 0x18, al
        0xFB, 0xF4, 0xEB, 0xFD, // sti; hlt; jmp to hlt
    ];
    let guest = Guest::with(&code, Options { vcpus: 1, interrupts: Interrupts::Engine, dirty_ring: None });
    write(&guest.memory, 4 * 13, &HANDLER.to_le_bytes());
    // mov al, 2; out 0x18, al; mov al, 0x20; out 0x20, al; iret
    write(&guest.memory, HANDLER.into(), &[0xB0, 0x02, 0xE6, 0x18, 0xB0, 0x20, 0xE6, 0x20, 0xCF]);
    let device = Arc::new(Recorder::new("interrupted"));
    guest.machine.ports().insert(0x18, 1, device.clone()).unwrap();
    guest.machine.start().unwrap();
    let started = Started { guest, device };
    until(|| started.count(1) == 1);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let _attached = started.guest.machine.vm().attach_line(5, &event).unwrap();
    for times in 1..=5 {
        event.write(1).unwrap();
        started.interrupted(times);
    }
}

#[test]
fn interrupts_that_a_machine_has_not_are_refused_by_name() {
    let guest = Guest::new(&[0xF4]);
    let vm = guest.machine.vm();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    for error in [
        vm.set_line(1, true).unwrap_err(),
        vm.signal_msi(MESSAGE).unwrap_err(),
        vm.attach_line(1, &event).err().unwrap(),
        vm.attach_msi(&event).err().unwrap(),
    ] {
        assert!(error.to_string().contains("without interrupt controllers"), "{error}");
    }
    let guest = Guest::with(&[0xF4], Options { vcpus: 1, interrupts: Interrupts::Engine, dirty_ring: None });
    for gsi in [24, u32::MAX] {
        let error = guest.machine.vm().set_line(gsi, true).unwrap_err();
        assert!(error.to_string().contains("0 to 23"), "{error}");
    }
}

/// A guest that writes 16 and then 8 bits to port 0x20, then to an address, and halts.
#[test]
fn doorbells_ring_without_an_exit() {
    let code = [
        0xB8, 0x34, 0x12, 0xE7, 0x20, // mov ax, 0x1234; out 0x20, ax
        0xB8, 0x35, 0x12, 0xE7, 0x20, // mov ax, 0x1235; out 0x20, ax
        0xE6, 0x22, // out 0x22, al
        0xB8, 0x00, 0xB8, 0x8E, 0xD8, // mov ax, 0xB800; mov ds, ax
        0x66, 0xC7, 0x06, 0x00, 0x00, 0x07, 0x00, 0x00, 0x00, // mov dword [0], 7
        0x66, 0xC7, 0x06, 0x00, 0x00, 0x08, 0x00, 0x00, 0x00, // mov dword [0], 8
        0xC6, 0x06, 0x10, 0x00, 0x09, // mov byte [0x10], 9
        0xF4, // hlt
    ];
    let guest = Guest::new(&code);
    let ports = Arc::new(Recorder::new("ports"));
    let addresses = Arc::new(Recorder::new("addresses"));
    guest.machine.ports().insert(0x20, 4, ports.clone()).unwrap();
    guest.machine.addresses().insert(0xB8000, 0x20, addresses.clone()).unwrap();
    let vm = guest.machine.vm();
    let doorbells = [
        Doorbell::Port { port: 0x20, value: Some(0x1234) },
        Doorbell::Port { port: 0x22, value: None },
        Doorbell::Address { address: 0xB8000, value: Some(7) },
        Doorbell::Address { address: 0xB8010, value: None },
    ];
    let rung = doorbells.map(|doorbell| {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let attached = vm.attach_doorbell(doorbell, &event).unwrap();
        (event, attached)
    });
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    for (event, _) in &rung {
        assert_eq!(event.read().unwrap(), 1);
    }
    assert_eq!(ports.writes(), [(0, vec![0x35, 0x12])], "only the value that does not ring");
    assert_eq!(addresses.writes(), [(0, vec![8, 0, 0, 0])]);
    // Without its doorbell, every write arrives.
    drop(rung);
    guest.machine.request_pause();
    guest.wait(|event| *event == Event::Paused);
    guest
        .machine
        .with_vcpu(0, |vcpu| {
            let mut registers = vcpu.registers()?;
            registers.rip = CODE;
            vcpu.set_registers(&registers)
        })
        .unwrap();
    guest.machine.resume().unwrap();
    guest.wait(|event| *event == Event::Halted);
    assert_eq!(ports.writes().len(), 1 + 3);
    assert_eq!(addresses.writes().len(), 1 + 3);
}
