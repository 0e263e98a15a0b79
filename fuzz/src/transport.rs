//! The registers of virtio-mmio, of virtio-pci in all its BARs, and of PCI configuration space: a driver writes and reads
//! anywhere in any width. A back-end gets only queues that are some, and is reset before it gets others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_vmm::bus::{Bus, BusDevice, Range};
use viaduct_vmm::pci::{ConfigPorts, Ecam, PciRoot, Windows};
use viaduct_vmm::virtio::mmio::VirtioMmio;
use viaduct_vmm::virtio::pci::{PciOptions, VirtioPci};
use viaduct_vmm::virtio::{Parameters, QueueSetup, VirtioBackend, feature};

use crate::quiet_vm::QuietVm;

const FEATURES: u64 = feature::VERSION_1 | feature::RING_PACKED | 0xFF;
const QUEUE_SIZE: u16 = 256;
const CONFIG: usize = 20;

#[derive(Clone, Default)]
struct Backend(Arc<AtomicBool>);

impl VirtioBackend for Backend {
    fn activate(&self, features: u64, queues: &[QueueSetup]) -> std::result::Result<(), String> {
        assert!(!self.0.swap(true, Ordering::Relaxed), "activated twice");
        assert_eq!(features & !FEATURES, 0, "features that were not offered");
        let packed = features & feature::RING_PACKED != 0;
        for queue in queues {
            let size = u64::from(queue.size);
            assert!(queue.size >= 1 && queue.size <= QUEUE_SIZE && (packed || queue.size.is_power_of_two()));
            let parts = if packed { [16 * size, 4, 4] } else { [16 * size, 6 + 2 * size, 6 + 8 * size] };
            let aligned = if packed { [16, 4, 4] } else { [16, 2, 4] };
            let addresses = [queue.descriptor, queue.driver, queue.device];
            for ((address, bytes), alignment) in addresses.into_iter().zip(parts).zip(aligned) {
                assert!(address % alignment == 0 && address.checked_add(bytes).is_some());
            }
        }
        if queues.len() == 1 { Err("one queue is too few".to_owned()) } else { Ok(()) }
    }

    fn reset(&self) {
        assert!(self.0.swap(false, Ordering::Relaxed), "reset without being active");
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Option<Vec<u8>> {
        assert!(offset as usize + data.len() <= CONFIG);
        Some(vec![data[0]; CONFIG])
    }

    fn driver_error(&self, _: &str) {}
}

fn parameters() -> Parameters {
    let config = vec![1; CONFIG];
    Parameters { name: "fuzzed".to_owned(), device_id: 1, features: FEATURES, queue_sizes: vec![QUEUE_SIZE; 3], config }
}

/// A value that often makes sense: small, a power of two, an address.
fn value(u: &mut Unstructured) -> Result<u64> {
    Ok(match u.int_in_range(0..=7u8)? {
        0..=3 => u64::from(u.int_in_range(0..=15u8)?),
        4 => 1 << u.int_in_range(0..=63u8)?,
        5 => u64::from(u.arbitrary::<u8>()?) << 12,
        6 => u64::MAX,
        _ => u.arbitrary()?,
    })
}

/// Offset and width: mostly a register's among the first `registers` bytes.
fn place(u: &mut Unstructured, registers: u64, width: usize) -> Result<(u64, usize)> {
    Ok(match u.int_in_range(0..=7u8)? {
        0..=5 => (u.int_in_range(0..=registers / width as u64 - 1)? * width as u64, width),
        6 => (u.int_in_range(0..=2 * registers)?, u.int_in_range(1..=8)?),
        _ => (u.arbitrary()?, u.int_in_range(1..=8)?),
    })
}

fn access(u: &mut Unstructured, device: &dyn BusDevice, offset: u64, width: usize) -> Result<()> {
    if u.ratio(1, 4)? {
        device.read(offset, &mut [0; 8][..width]);
    } else {
        device.write(offset, &value(u)?.to_le_bytes()[..width]);
    }
    Ok(())
}

/// The target of virtio-mmio.
pub fn mmio(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let vm = Arc::new(QuietVm { refuses: u.arbitrary()? });
    let backend = Backend::default();
    let device = VirtioMmio::new(vm, Box::new(backend.clone()), parameters(), 0xFEB0_0000, 16).expect("a device");
    while !u.is_empty() {
        if u.ratio(1, 32)? {
            match device.save() {
                Ok(state) => device.restore(&state).expect("its own state"),
                Err(text) => panic!("{text}"),
            }
            device.config_changed(&[u.arbitrary()?]).expect("a short configuration");
        }
        let (offset, width) = place(u, 0x110, 4)?;
        access(u, &device, offset, width)?;
    }
    Ok(())
}

struct Machine {
    ports: Arc<Bus>,
    addresses: Arc<Bus>,
    root: Arc<PciRoot>,
    device: Arc<VirtioPci>,
}

fn machine(u: &mut Unstructured) -> Result<Machine> {
    let vm = Arc::new(QuietVm { refuses: u.arbitrary()? });
    let (ports, addresses) = (Arc::new(Bus::ports()), Arc::new(Bus::addresses()));
    let windows = Windows {
        io: Range { base: 0xC000, last: 0xFFFF },
        memory32: Range { base: 0xC000_0000, last: 0xDFFF_FFFF },
        memory64: Range { base: 0x4_0000_0000, last: 0x13_FFFF_FFFF },
    };
    let root = PciRoot::new(vm.clone(), &ports, &addresses, windows, [5, 9, 10, 11]).expect("a bus");
    let options = PciOptions { transitional: true, port_notify: u.arbitrary()? };
    let device = VirtioPci::new(vm, Box::new(Backend::default()), parameters(), options).expect("a device");
    root.add(device.clone(), None).expect("a free slot");
    Ok(Machine { ports, addresses, root, device })
}

/// Every BAR answers where its register says, and nowhere else.
fn check_bars(machine: &Machine) {
    let mut answering = 0;
    let read = |offset: usize| {
        let mut data = [0; 4];
        machine.root.read_config(1 << 3, offset, &mut data);
        u32::from_le_bytes(data)
    };
    let command = read(4);
    for (_, _, bars) in machine.root.functions() {
        for (bar, place) in bars.into_iter().enumerate() {
            let Some(place) = place else { continue };
            answering += 1;
            let register = read(0x10 + 4 * bar);
            assert_ne!(command & if register & 1 != 0 { 1 } else { 2 }, 0, "BAR {bar} answers while decoding is off");
            assert_eq!(place as u32 & !0xF, register & !0xF, "BAR {bar}");
        }
    }
    assert_eq!(machine.ports.ranges().len() + machine.addresses.ranges().len(), answering);
}

/// The target of virtio-pci: its BARs, where they are put at the beginning.
pub fn pci(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let machine = machine(u)?;
    machine.root.write_config(1 << 3, 4, &[7, 0]);
    let bars = machine.root.functions()[1].2.map(|bar| bar.unwrap_or(0));
    while !u.is_empty() {
        let (bus, base, registers, width) = match u.int_in_range(0..=11u8)? {
            0..=2 => (&machine.ports, bars[0], 0x30, 2),
            3 => (&machine.addresses, bars[1], 64, 4),
            4 => (&machine.ports, bars[2], 12, 4),
            5 => (&machine.addresses, bars[4] + 0x1000, 4, 1),
            6 => (&machine.addresses, bars[4] + 0x2000, CONFIG as u64, 1),
            7 => (&machine.addresses, bars[4] + 0x3000, 16, 4),
            8 => {
                let state = machine.device.save().expect("nobody else is here");
                machine.device.restore(&state).expect("its own state");
                machine.device.config_changed(&[u.arbitrary()?]).expect("a short configuration");
                continue;
            }
            _ => (&machine.addresses, bars[4], 0x38, *u.choose(&[1, 2, 4, 8])?),
        };
        let (offset, width) = place(u, registers, width)?;
        let address = base.wrapping_add(offset);
        if u.ratio(1, 4)? {
            bus.read(address, &mut [0; 8][..width]);
        } else {
            bus.write(address, &value(u)?.to_le_bytes()[..width]);
        }
    }
    Ok(())
}

/// The target of configuration space, by ports and by addresses.
pub fn pci_config(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let machine = machine(u)?;
    let (ecam, ports) = (Ecam::new(machine.root.clone()), ConfigPorts::new(machine.root.clone(), None));
    while !u.is_empty() {
        match u.int_in_range(0..=7u8)? {
            0..=4 => {
                let width = *u.choose(&[1, 2, 4])?;
                let (offset, width) = place(u, 0x100, width)?;
                access(u, &ecam, offset.wrapping_add(1 << 15), width)?;
            }
            5 | 6 => {
                let (offset, width) = place(u, 8, 4)?;
                access(u, &ports, offset % 8, width.min(8 - offset as usize % 8))?;
            }
            _ => {
                let state = machine.root.save();
                machine.root.restore(&state).expect("its own state");
            }
        }
        check_bars(&machine);
    }
    machine.root.reset();
    check_bars(&machine);
    Ok(())
}
