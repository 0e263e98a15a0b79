//! Pause, resume, reset, save and restore, and the ways in which a guest ends.

mod guest;

use std::sync::Arc;
use std::time::Duration;

use guest::{CODE, Guest, MEMORY, PATIENCE, Recorder, until, write};
use viaduct_memory::GuestMemory;
use viaduct_vmm::bus::BusDevice;
use viaduct_vmm::engine::kvm::{self, Options};
use viaduct_vmm::engine::{EngineError, Interrupts, Table};
use viaduct_vmm::exits::Reason;
use viaduct_vmm::machine::{Event, MachineState};

/// inc dword [0x800]; out 0x18, al; jmp to the beginning
const COUNT: &[u8] = &[0x66, 0xFF, 0x06, 0x00, 0x08, 0xE6, 0x18, 0xEB, 0xF7];

fn counter(guest: &Guest) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|byte| guest.byte(0x800 + byte)))
}

fn pause(guest: &Guest) {
    guest.machine.request_pause();
    assert!(guest.machine.wait_paused(PATIENCE), "a pause is not lost");
}

#[test]
fn a_thousand_pauses_lose_nothing() {
    let guest = Guest::new(COUNT);
    let device = Arc::new(Recorder::new("counted"));
    guest.machine.ports().insert(0x18, 1, device.clone()).unwrap();
    guest.machine.start().unwrap();
    for _ in 0..1000 {
        pause(&guest);
        let registers = guest.machine.with_vcpu(0, |vcpu| vcpu.registers()).unwrap();
        let written = device.writes().len() as u32;
        // The access of a paused vCPU is complete: it is between two instructions.
        let expected = match registers.rip - CODE {
            0 | 7 => written,
            5 => written + 1,
            other => panic!("paused {other} bytes into the loop"),
        };
        assert_eq!(counter(&guest), expected);
        guest.machine.resume().unwrap();
    }
    let before = counter(&guest);
    until(|| counter(&guest) > before);
}

#[test]
fn registers_of_a_running_vcpu_are_refused() {
    let guest = Guest::new(&[0xEB, 0xFE]); // jmp to itself
    guest.machine.start().unwrap();
    until(|| guest.machine.with_vcpu(0, |vcpu| vcpu.registers()).is_err());
    let error = guest.machine.with_vcpu(0, |vcpu| vcpu.registers()).unwrap_err();
    assert!(error.to_string().contains("pause the machine"), "{error}");
    let error = guest.machine.with_vcpu(1, |vcpu| vcpu.registers()).unwrap_err();
    assert!(error.to_string().contains("vCPU 1"), "{error}");
    pause(&guest);
    guest.machine.with_vcpu(0, |vcpu| vcpu.registers()).unwrap();
}

#[test]
fn a_machine_may_have_64_vcpus() {
    // out 0x18, al; hlt
    let guest = Guest::with(&[0xE6, 0x18, 0xF4], Options { vcpus: 64, interrupts: Interrupts::None, dirty_ring: None });
    let device = Arc::new(Recorder::new("counted"));
    guest.machine.ports().insert(0x18, 1, device.clone()).unwrap();
    guest.machine.start().unwrap();
    until(|| device.writes().len() == 64);
    pause(&guest);
    for vcpu in 0..64 {
        assert_eq!(guest.machine.with_vcpu(vcpu, |vcpu| Ok(vcpu.registers()?.rip)).unwrap(), CODE + 3);
    }
    guest.machine.stop();
}

#[test]
fn processors_of_a_machine_with_interrupts_wait_for_their_start_message() {
    let guest = Guest::with(COUNT, Options { vcpus: 4, interrupts: Interrupts::Engine, dirty_ring: None });
    guest.machine.start().unwrap();
    until(|| counter(&guest) > 10);
    for _ in 0..10 {
        pause(&guest);
        for vcpu in 1..4 {
            assert_eq!(guest.machine.with_vcpu(vcpu, |vcpu| Ok(vcpu.registers()?.rip)).unwrap(), CODE);
        }
        guest.machine.resume().unwrap();
    }
}

#[test]
fn string_accesses_arrive_one_by_one() {
    let code = [
        0xBE, 0x00, 0x05, // mov si, 0x500
        0xBA, 0x18, 0x00, // mov dx, 0x18
        0xB9, 0x00, 0x01, // mov cx, 256
        0xFC, 0xF3, 0x6E, // cld; rep outsb
        0xBF, 0x00, 0x06, // mov di, 0x600
        0xB9, 0x04, 0x00, // mov cx, 4
        0xF3, 0x6D, // rep insw
        0xF4, // hlt
    ];
    let guest = Guest::new(&code);
    let bytes: Vec<u8> = (0..=255).collect();
    write(&guest.memory, 0x500, &bytes);
    let device = Arc::new(Recorder::new("counted"));
    guest.machine.ports().insert(0x18, 2, device.clone()).unwrap();
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    let expected: Vec<_> = bytes.iter().map(|byte| (0, vec![*byte])).collect();
    assert_eq!(device.writes(), expected);
    let read: Vec<_> = (0x600..0x608).map(|addr| guest.byte(addr)).collect();
    assert_eq!(read, [0xA0, 0xA1].repeat(4));
    let counts = guest.machine.exits(0).unwrap().counts();
    let count =
        |reason| counts.iter().find(|count| count.reason == reason && count.address == Some(0x18)).unwrap().count;
    assert_eq!((count(Reason::PortWrite), count(Reason::PortRead)), (256, 4));
}

#[test]
fn memory_accesses_without_memory_reach_their_device() {
    let code = [
        0xB8, 0x00, 0xB8, 0x8E, 0xD8, // mov ax, 0xB800; mov ds, ax
        0xC6, 0x06, 0x01, 0x00, 0x11, // mov byte [1], 0x11
        0xC7, 0x06, 0x02, 0x00, 0x22, 0x33, // mov word [2], 0x3322
        0x66, 0xC7, 0x06, 0x04, 0x00, 0x44, 0x55, 0x66, 0x77, // mov dword [4], 0x77665544
        0xA0, 0x08, 0x00, 0xE6, 0x18, // mov al, [8]; out 0x18, al
        0xA1, 0x08, 0x00, 0xE7, 0x18, // mov ax, [8]; out 0x18, ax
        0x66, 0xA1, 0x08, 0x00, 0x66, 0xE7, 0x18, // mov eax, [8]; out 0x18, eax
        0x66, 0xA1, 0x00, 0x10, 0x66, 0xE7, 0x18, // mov eax, [0x1000]; out 0x18, eax
        0xF4, // hlt
    ];
    let guest = Guest::new(&code);
    let registers = Arc::new(Recorder::new("registers"));
    let seen = Arc::new(Recorder::new("seen"));
    guest.machine.addresses().insert(0xB8000, 16, registers.clone()).unwrap();
    guest.machine.ports().insert(0x18, 4, seen.clone()).unwrap();
    guest.machine.start().unwrap();
    guest.wait(|event| *event == Event::Halted);
    assert_eq!(registers.writes(), [(1, vec![0x11]), (2, vec![0x22, 0x33]), (4, vec![0x44, 0x55, 0x66, 0x77])]);
    let expected: [&[u8]; 4] = [&[0xA0], &[0xA0, 0xA1], &[0xA0, 0xA1, 0xA2, 0xA3], &[0xFF; 4]];
    assert_eq!(seen.writes(), expected.map(|data| (0, data.to_vec())), "nobody's addresses read as ones");
}

#[test]
fn a_triple_fault_is_told_with_its_place() {
    let guest = Guest::new(&[0x66, 0xB8, 0x50, 0x00, 0x8E, 0xD8]); // mov ax, 0x50; mov ds, ax: there is no such segment
    guest.protected();
    guest
        .machine
        .with_vcpu(0, |vcpu| {
            let mut registers = vcpu.registers()?;
            registers.idt = Table { base: 0, limit: 0 };
            vcpu.set_registers(&registers)
        })
        .unwrap();
    guest.machine.start().unwrap();
    let event = guest.wait(|event| matches!(event, Event::TripleFault { .. }));
    let Event::TripleFault { at } = event else { unreachable!() };
    assert!(at.registers.iter().any(|(name, _)| *name == "rip"), "{at:x?}");
    assert!(guest.machine.wait_paused(PATIENCE), "the machine pauses by itself");
}

#[test]
fn what_the_engine_cannot_execute_is_told_with_its_bytes() {
    // jmp 0xB800:0, where there is no memory to execute from
    let guest = Guest::new(&[0xEA, 0x00, 0x00, 0x00, 0xB8]);
    guest.machine.start().unwrap();
    let event = guest.wait(|event| matches!(event, Event::Failed { .. } | Event::TripleFault { .. }));
    let (Event::Failed { at, .. } | Event::TripleFault { at }) = event else { unreachable!() };
    assert_eq!(at.address, 0xB8000);
    assert!(at.code.is_empty(), "{at:x?}");
    assert!(guest.machine.wait_paused(PATIENCE));
}

#[test]
fn a_reset_machine_begins_again() {
    for interrupts in [Interrupts::None, Interrupts::Engine, Interrupts::Split] {
        let guest = Guest::with(COUNT, Options { vcpus: 2, interrupts, dirty_ring: None });
        let new = guest.machine.with_vcpu(1, |vcpu| vcpu.registers()).unwrap();
        let start = guest.machine.with_vcpu(0, |vcpu| vcpu.registers()).unwrap();
        guest.machine.start().unwrap();
        for _ in 0..5 {
            until(|| counter(&guest) > 10);
            pause(&guest);
            guest.machine.reset().unwrap();
            let registers = guest.machine.with_vcpu(0, |vcpu| vcpu.registers()).unwrap();
            assert_eq!((registers.rip, registers.cs.base), (0xFFF0, 0xFFFF_0000), "the reset vector");
            write(&guest.memory, 0x800, &[0; 4]);
            guest.machine.with_vcpu(0, |vcpu| vcpu.set_registers(&start)).unwrap();
            guest.machine.with_vcpu(1, |vcpu| vcpu.set_registers(&new)).unwrap();
            guest.machine.resume().unwrap();
        }
        until(|| counter(&guest) > 10);
    }
}

#[test]
fn a_saved_machine_goes_on_in_another_one() {
    for interrupts in [Interrupts::None, Interrupts::Engine, Interrupts::Split] {
        let options = Options { vcpus: 1, interrupts, dirty_ring: None };
        let old = Guest::with(COUNT, options);
        old.machine.start().unwrap();
        until(|| counter(&old) > 100);
        pause(&old);
        let saved = serde_json::to_string(&old.machine.save().unwrap()).unwrap();
        let state: MachineState = serde_json::from_str(&saved).unwrap();
        let new = Guest::with(&[], options);
        new.machine.restore(&state).unwrap();
        let bytes: Vec<u8> = (0..MEMORY).map(|addr| old.byte(addr)).collect();
        write(&new.memory, 0, &bytes);
        let before = counter(&new);
        assert!(before > 100);
        new.machine.start().unwrap();
        until(|| counter(&new) > before + 100);
        let registers = |guest: &Guest| guest.machine.with_vcpu(0, |vcpu| vcpu.registers()).unwrap();
        pause(&new);
        assert_eq!(registers(&new).cs, registers(&old).cs);
    }
}

#[test]
fn states_that_are_none_are_refused() {
    let guest = Guest::new(&[0xF4]);
    let state = serde_json::to_value(guest.machine.save().unwrap()).unwrap();
    let mut other = state.clone();
    other["vcpus"] = serde_json::json!([]);
    let error = guest.machine.restore(&serde_json::from_value(other).unwrap()).unwrap_err();
    assert!(error.to_string().contains("0 vCPUs for a machine of 1"), "{error}");
    for wrong in [serde_json::json!("00"), serde_json::json!("0g"), serde_json::json!("0"), serde_json::json!(1)] {
        let mut other = state.clone();
        other["vcpus"][0]["regs"] = wrong;
        let error = guest.machine.restore(&serde_json::from_value(other).unwrap()).unwrap_err();
        assert!(matches!(&error, EngineError::Invalid(_)), "{error}");
    }
    guest.machine.restore(&serde_json::from_value(state).unwrap()).unwrap();
}

/// A device that stops the world.
struct Slow(parking_lot::Mutex<()>);

impl BusDevice for Slow {
    fn name(&self) -> &str {
        "slow"
    }
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {
        drop(self.0.lock());
    }
}

#[test]
fn a_pause_waits_for_a_device_and_no_longer() {
    let guest = Guest::new(COUNT);
    let device = Arc::new(Slow(parking_lot::Mutex::new(())));
    guest.machine.ports().insert(0x18, 1, device.clone()).unwrap();
    let busy = device.0.lock();
    guest.machine.start().unwrap();
    until(|| counter(&guest) == 1);
    guest.machine.request_pause();
    assert!(!guest.machine.wait_paused(Duration::from_millis(50)));
    drop(busy);
    assert!(guest.machine.wait_paused(PATIENCE));
    assert_eq!(counter(&guest), 1);
}

#[test]
fn machines_that_cannot_be_are_refused() {
    let memory = GuestMemory::allocate(MEMORY).unwrap();
    for vcpus in [0, 65, usize::MAX] {
        let error =
            kvm::create(&memory, Options { vcpus, interrupts: Interrupts::None, dirty_ring: None }).err().unwrap();
        assert!(error.to_string().contains("allowed are 1 to 64"), "{error}");
    }
    let options = Options { vcpus: 1, interrupts: Interrupts::None, dirty_ring: None };
    let error = kvm::create(&GuestMemory::new(), options).err().unwrap();
    assert!(error.to_string().contains("needs memory"), "{error}");
    let odd = GuestMemory::allocate(MEMORY + 100).unwrap();
    let error = kvm::create(&odd, options).err().unwrap();
    assert!(error.to_string().contains("multiples of 0x1000"), "{error}");
}

#[test]
fn a_machine_is_started_once_and_resumed_only_then() {
    let guest = Guest::new(&[0xF4]);
    assert!(guest.machine.resume().is_err());
    guest.machine.start().unwrap();
    assert!(guest.machine.start().is_err());
    guest.machine.stop();
    guest.machine.stop();
    assert!(guest.machine.resume().is_err());
}

#[test]
fn memory_may_change_while_the_guest_runs() {
    // mov ax, 0xA000; mov ds, ax; inc byte [0]; jmp to inc
    let guest = Guest::new(&[0xB8, 0x00, 0xA0, 0x8E, 0xD8, 0xFE, 0x06, 0x00, 0x00, 0xEB, 0xFA]);
    let device = Arc::new(Recorder::new("where memory will be"));
    guest.machine.addresses().insert(0xA0000, 0x1000, device.clone()).unwrap();
    guest.machine.start().unwrap();
    for _ in 0..20 {
        let before = device.writes().len();
        until(|| device.writes().len() > before);
        let window =
            viaduct_memory::RegionSpec { guest_addr: 0xA0000, size: 0x1000, user_addr: 0xA0000, mmap_offset: 0 };
        let with = guest.memory.with_region(window, viaduct_memory::memfd(0x1000).unwrap()).unwrap();
        guest.machine.owned().set_memory(&with).unwrap();
        let byte = || {
            let span = with.translate(&mut viaduct_memory::RegionCache::default(), 0xA0000, 1).unwrap();
            let mut byte = [0];
            // SAFETY: `with` is alive and the span is one byte long.
            unsafe { span.read(0, &mut byte) };
            byte[0]
        };
        let before = byte();
        until(|| byte() != before);
        guest.machine.owned().set_memory(&guest.memory).unwrap();
    }
}
