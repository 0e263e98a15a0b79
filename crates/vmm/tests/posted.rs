//! Writes that are posted: they cost no exit, and arrive in order, before the next access that has to be answered.

mod guest;

use std::sync::Arc;

use guest::{Guest, Recorder};
use parking_lot::Mutex;
use viaduct_vmm::bus::{BusDevice, Range};
use viaduct_vmm::engine::Interrupts;
use viaduct_vmm::engine::kvm::Options;
use viaduct_vmm::exits::Reason;
use viaduct_vmm::machine::Event;

/// What happened: where, offset, bytes.
type Journal = Arc<Mutex<Vec<(&'static str, u64, Vec<u8>)>>>;

/// Registers whose first four are posted. All of them write to one journal.
struct Posting {
    name: &'static str,
    journal: Journal,
}

impl BusDevice for Posting {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.journal.lock().push(("read", offset, Vec::new()));
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.journal.lock().push((self.name, offset, data.to_vec()));
    }

    fn posted(&self) -> &[Range] {
        &[Range { base: 0, last: 3 }]
    }
}

/// Ports from 0x10 and addresses from 0xB8000.
fn with_devices(guest: &Guest) -> Journal {
    let journal = Journal::default();
    let device = |name| Arc::new(Posting { name, journal: journal.clone() });
    guest.machine.ports().insert(0x10, 8, device("port")).unwrap();
    guest.machine.addresses().insert(0xB8000, 8, device("address")).unwrap();
    journal
}

fn count(guest: &Guest, wanted: Reason) -> u64 {
    let counts = guest.machine.exits(0).unwrap().counts();
    counts.iter().filter(|count| count.reason == wanted).map(|count| count.count).sum()
}

#[test]
fn posted_writes_arrive_in_order_before_the_next_exit() {
    let guest = Guest::new(&[
        0xB8, 0x00, 0xB8, 0x8E, 0xD8, // mov ax, 0xB800; mov ds, ax
        0xB0, 0x01, 0xE6, 0x10, // mov al, 1; out 0x10, al
        0xC6, 0x06, 0x01, 0x00, 0x02, // mov byte [1], 2
        0xB8, 0x03, 0x04, 0xE7, 0x12, // mov ax, 0x403; out 0x12, ax
        0x66, 0xC7, 0x06, 0x00, 0x00, 0x05, 0x06, 0x07, 0x08, // mov dword [0], 0x08070605
        0xE4, 0x10, // in al, 0x10: reads are never posted
        0xB0, 0x09, 0xE6, 0x13, // mov al, 9; out 0x13, al
        0xE7, 0x13, // out 0x13, ax: not all of it is posted
        0xC6, 0x06, 0x03, 0x00, 0x0A, // mov byte [3], 0xA
        0xF4, // hlt
    ]);
    let journal = with_devices(&guest);
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    let expected = [
        ("port", 0, vec![1]),
        ("address", 1, vec![2]),
        ("port", 2, vec![3, 4]),
        ("address", 0, vec![5, 6, 7, 8]),
        ("read", 0, vec![]),
        ("port", 3, vec![9]),
        ("port", 3, vec![9, 4]),
        ("address", 3, vec![0xA]),
    ];
    assert_eq!(*journal.lock(), expected, "the last one before HLT is reported");
    assert_eq!(count(&guest, Reason::PostedWrite), 6);
    assert_eq!((count(&guest, Reason::PortWrite), count(&guest, Reason::MmioWrite)), (1, 0));
    assert_eq!(count(&guest, Reason::PortRead), 1);
}

#[test]
fn more_posted_writes_than_the_engine_keeps_are_exits_and_none_is_lost() {
    let guest = Guest::new(&[
        0xB9, 0xE8, 0x03, // mov cx, 1000
        0x89, 0xC8, 0xE7, 0x10, // mov ax, cx; out 0x10, ax
        0xE2, 0xFA, // loop to mov ax
        0xF4, // hlt
    ]);
    let journal = with_devices(&guest);
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    let values: Vec<_> = journal.lock().iter().map(|(_, _, data)| u16::from_le_bytes([data[0], data[1]])).collect();
    assert_eq!(values, (1..=1000).rev().collect::<Vec<_>>());
    let (posted, exits) = (count(&guest, Reason::PostedWrite), count(&guest, Reason::PortWrite));
    assert_eq!(posted + exits, 1000);
    assert!((1..20).contains(&exits), "{exits}");
}

#[test]
fn a_pause_delivers_what_was_posted() {
    let guest = Guest::new(&[
        0xB0, 0x07, 0xE6, 0x11, // mov al, 7; out 0x11, al
        0xB0, 0x01, 0xA2, 0x00, 0x30, // mov al, 1; mov [0x3000], al
        0xEB, 0xFE, // jmp to itself
    ]);
    let journal = with_devices(&guest);
    guest.machine.start().unwrap();
    guest::until(|| guest.byte(0x3000) == 1);
    guest.machine.request_pause();
    guest.wait(|event| *event == Event::Paused);
    assert_eq!(*journal.lock(), [("port", 1, vec![7])]);
}

#[test]
fn a_device_that_has_gone_posts_nothing() {
    let guest = Guest::new(&[
        0xE6, 0x10, 0xF4, // out 0x10, al; hlt
        0xE6, 0x10, 0xF4, // the same
    ]);
    let journal = with_devices(&guest);
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    assert_eq!(journal.lock().len(), 1);
    guest.machine.ports().remove(0x10).unwrap();
    let other = Arc::new(Recorder::new("other"));
    guest.machine.ports().insert(0x10, 1, other.clone()).unwrap();
    guest.machine.resume().unwrap();
    guest.wait(|event| *event == Event::Halted);
    assert_eq!(other.writes().len(), 1);
    assert_eq!((count(&guest, Reason::PostedWrite), count(&guest, Reason::PortWrite)), (1, 1));
}

#[test]
fn each_vcpu_sees_its_own_writes_arrive_before_its_exits() {
    // Each writes its number to the posted port and then to one that is not, a thousand times.
    let code = [
        0xB9, 0xE8, 0x03, // mov cx, 1000
        0x88, 0xD8, // mov al, bl
        0xE6, 0x10, 0xE6, 0x14, // out 0x10, al; out 0x14, al
        0xE2, 0xFA, // loop to out 0x10
        0xF4, // hlt
    ];
    let guest = Guest::with(&code, Options { vcpus: 2, interrupts: Interrupts::None, dirty_ring: None });
    for vcpu in 0..2 {
        let mut registers = guest.machine.with_vcpu(vcpu, |vcpu| vcpu.registers()).unwrap();
        registers.rbx = vcpu as u64 + 1;
        guest.machine.with_vcpu(vcpu, |vcpu| vcpu.set_registers(&registers)).unwrap();
    }
    let journal = with_devices(&guest);
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    guest.wait(|event| *event == Event::Halted);
    for vcpu in 1..=2 {
        let own: Vec<_> =
            journal.lock().iter().filter(|(_, _, data)| data[..] == [vcpu]).map(|(_, offset, _)| *offset).collect();
        assert_eq!(own, [0, 4].repeat(1000), "vCPU {vcpu}");
    }
}
