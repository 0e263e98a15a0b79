//! A guest of a few bytes: real mode, one processor unless said otherwise, its code at [`CODE`].

#![allow(dead_code, reason = "each test program uses some of it")]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_vmm::bus::BusDevice;
use viaduct_vmm::engine::kvm::{self, Options};
use viaduct_vmm::engine::{Interrupts, Segment, Table};
use viaduct_vmm::machine::{Event, Machine, Owner};

/// Where the code begins.
pub const CODE: u64 = 0x1000;
/// Where descriptors are in protected mode.
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
/// How long a test waits for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of memory, from address 0; behind them, below 1 MiB, is room for devices.
pub const MEMORY: u64 = 1 << 19;

struct Events(Mutex<Sender<Event>>);

impl Owner for Events {
    fn event(&self, _vcpu: usize, event: Event) {
        if matches!(event, Event::Failed { .. } | Event::TripleFault { .. }) {
            eprintln!("the guest: {event:x?}");
        }
        // The test may have ended.
        let _ = self.0.lock().send(event);
    }
}

pub struct Guest {
    pub machine: Arc<Machine>,
    pub memory: GuestMemory,
    events: Receiver<Event>,
}

impl Guest {
    pub fn new(code: &[u8]) -> Guest {
        Guest::with(code, Options { vcpus: 1, interrupts: Interrupts::None, dirty_ring: None })
    }

    pub fn with(code: &[u8], options: Options) -> Guest {
        let memory = GuestMemory::allocate(MEMORY).unwrap();
        write(&memory, CODE, code);
        let parts = kvm::create(&memory, options).expect("these tests need /dev/kvm");
        let (sender, events) = channel();
        let machine = Arc::new(Machine::new(parts, Box::new(Events(Mutex::new(sender)))).unwrap());
        for vcpu in 0..options.vcpus {
            machine
                .with_vcpu(vcpu, |vcpu| {
                    let mut registers = vcpu.registers()?;
                    for segment in [&mut registers.cs, &mut registers.ds, &mut registers.es, &mut registers.ss] {
                        *segment = Segment { selector: 0, base: 0, ..*segment };
                    }
                    registers.rip = CODE;
                    registers.rsp = CODE;
                    registers.rflags = 2;
                    vcpu.set_registers(&registers)
                })
                .unwrap();
        }
        Guest { machine, memory, events }
    }

    /// Makes vCPU 0 begin in 32-bit protected mode with flat segments: its interrupt descriptors are at [`IDT`].
    pub fn protected(&self) {
        self.machine
            .with_vcpu(0, |vcpu| {
                let mut registers = vcpu.registers()?;
                let flat = Segment { limit: u32::MAX, present: true, s: true, db: true, g: true, ..Segment::default() };
                registers.cs = Segment { selector: 8, kind: 0xB, ..flat };
                let data = Segment { selector: 16, kind: 0x3, ..flat };
                (registers.ds, registers.es, registers.ss) = (data, data, data);
                registers.cr0 |= 1;
                registers.gdt = Table { base: GDT, limit: 23 };
                registers.idt = Table { base: IDT, limit: 0x7FF };
                vcpu.set_registers(&registers)
            })
            .unwrap();
        let descriptors: [u64; 3] = [0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
        for (index, descriptor) in descriptors.into_iter().enumerate() {
            write(&self.memory, GDT + 8 * index as u64, &descriptor.to_le_bytes());
        }
    }

    /// In protected mode: `code` handles interrupt `vector`.
    pub fn set_handler(&self, vector: u8, at: u32, code: &[u8]) {
        let gate = 0x0008_0000 | u64::from(at & 0xFFFF) | 0x8E00 << 32 | u64::from(at >> 16) << 48;
        write(&self.memory, IDT + 8 * u64::from(vector), &gate.to_le_bytes());
        write(&self.memory, at.into(), code);
    }

    /// Waits for an event; others before it are lost.
    pub fn wait(&self, wanted: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) if wanted(&event) => return event,
                Ok(event) => seen.push(event),
                Err(error) => panic!("{error}; until then there were {seen:x?}"),
            }
        }
    }

    pub fn byte(&self, addr: u64) -> u8 {
        byte(&self.memory, addr)
    }
}

pub fn byte(memory: &GuestMemory, addr: u64) -> u8 {
    let mut byte = [0];
    let span = memory.translate(&mut RegionCache::default(), addr, 1).unwrap();
    // SAFETY: `memory` is alive and the span is one byte long.
    unsafe { span.read(0, &mut byte) };
    byte[0]
}

pub fn write(memory: &GuestMemory, addr: u64, data: &[u8]) {
    let span = memory.translate(&mut RegionCache::default(), addr, data.len() as u32).unwrap();
    // SAFETY: `memory` is alive and the span has this length.
    unsafe { span.write(0, data) };
}

/// A device that remembers what is written, and reads as A0, A1, A2, ...
pub struct Recorder {
    name: &'static str,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Recorder {
    pub fn new(name: &'static str) -> Recorder {
        Recorder { name, writes: Mutex::default() }
    }

    pub fn writes(&self) -> Vec<(u64, Vec<u8>)> {
        self.writes.lock().clone()
    }
}

impl BusDevice for Recorder {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.iter_mut().zip(0xA0..).for_each(|(byte, value)| *byte = value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.writes.lock().push((offset, data.to_vec()));
    }
}

/// Waits until `condition` holds.
pub fn until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "it did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}
