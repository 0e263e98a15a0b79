//! virtio-pci as a driver sees it: found by its capabilities, set up, rung and interrupting (virtio 1.2, 4.1), by the
//! modern and by the legacy interface.

mod doubles;

use std::sync::Arc;
use std::time::{Duration, Instant};

use doubles::{NotingBackend, QuietVm, Told};
use proptest::prelude::*;
use viaduct_vmm::bus::{Bus, Range};
use viaduct_vmm::engine::{Doorbell, Msi};
use viaduct_vmm::pci::{PciRoot, Windows};
use viaduct_vmm::virtio::common_configuration::register;
use viaduct_vmm::virtio::pci::{NO_VECTOR, PciOptions, PciTransportState, VirtioPci};
use viaduct_vmm::virtio::{Parameters, feature, legacy};

const SLOT: u32 = 1 << 3;
const GSI: u32 = 9;
const FEATURES: u64 = feature::VERSION_1 | feature::RING_PACKED | 0b101;

struct Guest {
    vm: QuietVm,
    backend: NotingBackend,
    ports: Arc<Bus>,
    addresses: Arc<Bus>,
    root: Arc<PciRoot>,
    device: Arc<VirtioPci>,
}

fn parameters(device_id: u16, queues: usize) -> Parameters {
    let config = (0..16).collect();
    Parameters { name: "virtio-test".to_owned(), device_id, features: FEATURES, queue_sizes: vec![256; queues], config }
}

impl Guest {
    fn new(transitional: bool, port_notify: bool) -> Guest {
        Guest::on(QuietVm::new(), PciOptions { transitional, port_notify })
    }

    fn on(vm: QuietVm, options: PciOptions) -> Guest {
        let (ports, addresses) = (Arc::new(Bus::ports()), Arc::new(Bus::addresses()));
        let windows = Windows {
            io: Range { base: 0xC000, last: 0xFFFF },
            memory32: Range { base: 0xC000_0000, last: 0xDFFF_FFFF },
            memory64: Range { base: 0x4_0000_0000, last: 0x13_FFFF_FFFF },
        };
        let root = PciRoot::new(Arc::new(vm.clone()), &ports, &addresses, windows, [5, 9, 10, 11]).unwrap();
        let backend = NotingBackend::default();
        let device =
            VirtioPci::new(Arc::new(vm.clone()), Box::new(backend.clone()), parameters(2, 3), options).unwrap();
        assert_eq!(root.add(device.clone(), None), Ok(1));
        root.write_config(SLOT, 4, &[7, 0]);
        Guest { vm, backend, ports, addresses, root, device }
    }

    fn config(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.root.read_config(SLOT, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn bar(&self, bar: usize) -> u64 {
        self.root.functions()[1].2[bar].unwrap()
    }

    /// Of each capability of virtio: its offset, kind, BAR, offset and length.
    fn capabilities(&self) -> Vec<(usize, u8, u8, u32, u32)> {
        let mut found = Vec::new();
        let mut at = self.config(0x34) as usize & 0xFF;
        while at != 0 {
            let head = self.config(at).to_le_bytes();
            if head[0] == 9 {
                found.push((at, head[3], self.config(at + 4) as u8, self.config(at + 8), self.config(at + 12)));
            }
            at = head[1].into();
        }
        found
    }

    fn place(&self, kind: u8) -> u64 {
        let (_, _, bar, offset, _) = *self.capabilities().iter().find(|(_, found, ..)| *found == kind).unwrap();
        self.bar(bar.into()) + u64::from(offset)
    }

    fn read(&self, at: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.addresses.read(at, &mut data[..width]));
        u64::from_le_bytes(data)
    }

    fn write(&self, at: u64, width: usize, value: u64) {
        assert!(self.addresses.write(at, &value.to_le_bytes()[..width]));
    }

    fn common(&self, register: u64, width: usize) -> u64 {
        self.read(self.place(1) + register, width)
    }

    fn set_common(&self, register: u64, width: usize, value: u64) {
        self.write(self.place(1) + register, width, value);
    }

    fn negotiate(&self, features: u64) -> u64 {
        self.set_common(register::DEVICE_STATUS, 1, 1);
        self.set_common(register::DEVICE_STATUS, 1, 3);
        for window in 0..2 {
            self.set_common(register::DRIVER_FEATURE_SELECT, 4, window);
            self.set_common(register::DRIVER_FEATURE, 4, features >> (32 * window) & 0xFFFF_FFFF);
        }
        self.set_common(register::DEVICE_STATUS, 1, 11);
        self.common(register::DEVICE_STATUS, 1)
    }

    fn set_up(&self, queue: u64, address: u64) {
        self.set_common(register::QUEUE_SELECT, 2, queue);
        self.set_common(register::QUEUE_SIZE, 2, 64);
        for (at, address) in [
            (register::QUEUE_DESC, address),
            (register::QUEUE_DRIVER, address + 0x1000),
            (register::QUEUE_DEVICE, address + 0x2000),
        ] {
            self.set_common(at, 4, address & 0xFFFF_FFFF);
            self.set_common(at + 4, 4, address >> 32);
        }
        self.set_common(register::QUEUE_ENABLE, 2, 1);
        assert_eq!(self.common(register::QUEUE_ENABLE, 2), 1);
    }

    /// Starts queues 0 and 2.
    fn start(&self) {
        assert_eq!(self.negotiate(feature::VERSION_1 | 1), 11);
        self.set_up(0, 0x1_0001_0000);
        self.set_up(2, 0x2_0000);
        self.set_common(register::DEVICE_STATUS, 1, 15);
    }

    /// Switches MSI-X on; vector n is message n.
    fn messages(&self) {
        for vector in 0..4 {
            let entry = self.bar(1) + 16 * vector;
            self.write(entry, 8, 0xFEE0_0000);
            self.write(entry + 8, 8, vector);
        }
        let mut at = self.config(0x34) as usize & 0xFF;
        while self.config(at) as u8 != 0x11 {
            at = self.config(at) as usize >> 8 & 0xFF;
        }
        self.root.write_config(SLOT, at + 2, &[0, 0x80]);
    }

    fn event(&self, queue: usize) -> &vmm_sys_util::eventfd::EventFd {
        &self.device.front_end().events()[queue].call
    }

    fn kicked(&self) -> Vec<usize> {
        let events = self.device.front_end().events().iter().enumerate();
        events.filter(|(_, events)| events.kick.read().is_ok()).map(|(queue, _)| queue).collect()
    }

    fn port(&self, offset: u64, width: usize) -> u32 {
        let mut data = [0; 4];
        assert!(self.ports.read(self.bar(0) + offset, &mut data[..width]));
        u32::from_le_bytes(data)
    }

    fn set_port(&self, offset: u64, width: usize, value: u32) {
        assert!(self.ports.write(self.bar(0) + offset, &value.to_le_bytes()[..width]));
    }
}

fn message(data: u32) -> Msi {
    Msi { address: 0xFEE0_0000, data }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn it_says_who_it_is() {
    let modern = Guest::new(false, false);
    assert_eq!((modern.config(0), modern.config(8)), (0x1042_1AF4, 0x0100_0001));
    assert_eq!(modern.config(0x2C), 0x0042_1AF4);
    assert_eq!(modern.config(0x10), 0, "no ports");
    let transitional = Guest::new(true, false);
    assert_eq!((transitional.config(0), transitional.config(8)), (0x1001_1AF4, 0x0100_0000));
    assert_eq!(transitional.config(0x2C), 0x0002_1AF4);
    assert_eq!(transitional.config(0x10) & 1, 1);
}

#[test]
fn capabilities_name_every_structure() {
    let guest = Guest::new(false, false);
    let kinds: Vec<_> = guest.capabilities().iter().map(|(_, kind, bar, _, length)| (*kind, *bar, *length)).collect();
    assert_eq!(kinds, [(1, 4, 0x38), (2, 4, 12), (3, 4, 1), (4, 4, 0x1000), (5, 0, 0)]);
    let both = Guest::new(true, true);
    let kinds: Vec<_> = both.capabilities().iter().map(|(_, kind, bar, ..)| (*kind, *bar)).collect();
    assert_eq!(kinds, [(1, 4), (2, 2), (2, 4), (3, 4), (4, 4), (5, 0)], "ports come first, as they exit faster");
    let notify = both.capabilities()[1].0;
    assert_eq!(both.config(notify + 16), 4, "bytes between two queues' notifications");
}

#[test]
fn some_devices_cannot_be() {
    let make = |device_id, queues, transitional, port_notify| {
        let options = PciOptions { transitional, port_notify };
        let backend = Box::new(NotingBackend::default());
        VirtioPci::new(Arc::new(QuietVm::new()), backend, parameters(device_id, queues), options).map(drop)
    };
    assert_eq!(make(26, 3, false, false), Ok(()));
    assert!(make(26, 3, true, false).unwrap_err().contains("transitional"), "a file system is newer than that");
    assert!(make(0x40, 3, false, false).is_err());
    assert_eq!(make(2, 64, false, true), Ok(()));
    assert!(make(2, 65, false, true).is_err());
    assert!(make(2, 1025, false, false).unwrap_err().contains("1025 queues; at most 1024"));
}

#[test]
fn a_modern_driver_starts_it() {
    let guest = Guest::new(false, false);
    assert_eq!(guest.common(register::NUM_QUEUES, 2), 3);
    let offered = [0, 1, 2].map(|window| {
        guest.set_common(register::DEVICE_FEATURE_SELECT, 4, window);
        guest.common(register::DEVICE_FEATURE, 4)
    });
    assert_eq!(offered, [FEATURES & 0xFFFF_FFFF, FEATURES >> 32, 0]);
    assert_eq!(guest.negotiate(feature::VERSION_1 | 2), 3, "that was not offered");
    assert!(matches!(guest.backend.told().as_slice(), [Told::Error(_)]));
    guest.start();
    assert_eq!(guest.common(register::DEVICE_STATUS, 1), 15);
    let told = guest.backend.told();
    let [Told::Activate { features, queues }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(*features, feature::VERSION_1 | 1);
    let seen: Vec<_> =
        queues.iter().map(|queue| (queue.index, queue.size, queue.descriptor, queue.driver, queue.device)).collect();
    assert_eq!(seen, [(0, 64, 0x1_0001_0000, 0x1_0001_1000, 0x1_0001_2000), (2, 64, 0x2_0000, 0x2_1000, 0x2_2000)]);
    guest.set_common(register::DEVICE_STATUS, 1, 0);
    assert_eq!(guest.common(register::DEVICE_STATUS, 1), 0);
    assert_eq!(guest.backend.told(), [Told::Reset]);
    guest.set_common(register::QUEUE_SELECT, 2, 0);
    assert_eq!(guest.common(register::QUEUE_SIZE, 2), 256);
}

#[test]
fn registers_are_read_back() {
    let guest = Guest::new(false, false);
    guest.set_common(register::QUEUE_SELECT, 2, 1);
    guest.set_common(register::QUEUE_DESC, 8, 0x1122_3344_5566_7780);
    guest.set_common(register::QUEUE_DEVICE + 4, 4, 7);
    assert_eq!(guest.common(register::QUEUE_DESC, 4), 0x5566_7780);
    assert_eq!(guest.common(register::QUEUE_DESC, 8), 0x1122_3344_5566_7780);
    assert_eq!(guest.common(register::QUEUE_DEVICE, 8), 7 << 32);
    assert_eq!(guest.common(register::QUEUE_SELECT, 2), 1);
    assert_eq!(guest.common(register::QUEUE_NOTIFY_OFF, 2), 1);
    guest.set_common(register::QUEUE_SIZE, 2, 3);
    guest.set_common(register::QUEUE_ENABLE, 2, 1);
    assert_eq!((guest.common(register::QUEUE_SIZE, 2), guest.common(register::QUEUE_ENABLE, 2)), (3, 0));
    for index in [3, 0xFFFF] {
        guest.set_common(register::QUEUE_SELECT, 2, index);
        assert_eq!(guest.common(register::QUEUE_SIZE, 2), 0, "there is no such queue");
        guest.set_common(register::QUEUE_MSIX_VECTOR, 2, 0);
        assert_eq!(guest.common(register::QUEUE_MSIX_VECTOR, 2), 0xFFFF);
    }
    assert_eq!(guest.common(register::CONFIG_MSIX_VECTOR, 2), 0xFFFF, "and the last vector is not a queue's");
    assert_eq!(guest.common(register::QUEUE_SELECT, 4), 0, "registers have one width");
    guest.set_common(register::QUEUE_SELECT, 1, 0);
    assert_eq!(guest.common(register::QUEUE_SELECT, 2), 0xFFFF);
}

#[test]
fn doorbells_follow_the_bars() {
    let guest = Guest::new(false, true);
    assert_eq!(guest.vm.doorbells(), []);
    guest.start();
    let (memory, ports) = (guest.place(1) + 0x3000, guest.place(2));
    let address = |address| Doorbell::Address { address, value: None };
    let port = |port: u64| Doorbell::Port { port: port as u16, value: None };
    assert_eq!(guest.vm.doorbells(), [address(memory), port(ports), address(memory + 8), port(ports + 8)]);
    assert!(guest.vm.write_address(memory + 8, 0xFFFF));
    assert_eq!(guest.kicked(), [2]);
    guest.root.write_config(SLOT, 0x24, &[6, 0, 0, 0]);
    let memory = memory & 0xFFFF_FFFF | 6 << 32;
    assert_eq!(guest.vm.doorbells(), [address(memory), port(ports), address(memory + 8), port(ports + 8)]);
    guest.root.write_config(SLOT, 4, &[6, 0]);
    assert_eq!(guest.vm.doorbells(), [address(memory), address(memory + 8)], "ports are off");
    guest.root.write_config(SLOT, 4, &[4, 0]);
    assert_eq!(guest.vm.doorbells(), []);
}

#[test]
fn without_doorbells_the_structures_ring() {
    let guest = Guest::on(QuietVm::without_doorbells(), PciOptions { transitional: true, port_notify: true });
    guest.start();
    let memory = guest.place(1) + 0x3000;
    guest.write(memory + 8, 2, 2);
    assert_eq!(guest.kicked(), [2]);
    guest.write(memory, 4, 0);
    assert!(guest.ports.write(guest.bar(2) + 8, &[2]));
    assert_eq!(guest.kicked(), [0, 2]);
    for offset in [2, 12, 0xFFC] {
        guest.write(memory + offset, 2, 0);
    }
    assert_eq!(guest.kicked(), Vec::<usize>::new(), "of no queue");
    guest.set_port(legacy::register::QUEUE_NOTIFY, 2, 0);
    assert_eq!(guest.kicked(), [0]);
}

#[test]
fn used_buffers_and_changes_are_messages() {
    let guest = Guest::new(false, false);
    guest.messages();
    guest.set_common(register::CONFIG_MSIX_VECTOR, 2, 0);
    for (queue, vector) in [(0, 1), (2, 3)] {
        guest.set_common(register::QUEUE_SELECT, 2, queue);
        guest.set_common(register::QUEUE_MSIX_VECTOR, 2, vector);
        assert_eq!(guest.common(register::QUEUE_MSIX_VECTOR, 2), vector);
    }
    guest.start();
    guest.event(2).write(1).unwrap();
    assert_eq!(guest.vm.messages(), [message(3)]);
    guest.event(0).write(1).unwrap();
    assert_eq!(guest.vm.messages(), [message(1)]);
    guest.device.config_changed(&[9; 16]).unwrap();
    assert_eq!(guest.vm.messages(), [message(0)]);
    guest.device.config_changed(&[9; 16]).unwrap();
    assert_eq!(guest.vm.messages(), [], "it is the same");
    assert_eq!(guest.read(guest.place(3), 1), 0, "no ISR status with messages");
    guest.device.needs_reset();
    assert_eq!((guest.vm.messages(), guest.common(register::DEVICE_STATUS, 1)), (vec![message(0)], 15 | 0x40));
    guest.set_common(register::QUEUE_MSIX_VECTOR, 2, 4);
    assert_eq!(guest.common(register::QUEUE_MSIX_VECTOR, 2), u64::from(NO_VECTOR), "there are four");
    guest.set_common(register::DEVICE_STATUS, 1, 0);
    guest.set_common(register::QUEUE_SELECT, 2, 0);
    assert_eq!(guest.common(register::QUEUE_MSIX_VECTOR, 2), u64::from(NO_VECTOR));
    assert_eq!(guest.vm.routes(), 0);
}

#[test]
fn without_messages_there_is_a_level_and_its_reason() {
    let guest = Guest::new(false, false);
    guest.start();
    let isr = guest.place(3);
    guest.event(2).write(1).unwrap();
    until("INTA is high", || guest.vm.level(GSI));
    assert_eq!(guest.read(isr, 1), 1);
    assert!(!guest.vm.level(GSI), "reading it clears both");
    assert_eq!(guest.read(isr, 1), 0);
    guest.device.config_changed(&[1]).unwrap();
    until("INTA is high", || guest.vm.level(GSI));
    assert_eq!(guest.read(isr, 4), 2);
    guest.event(0).write(1).unwrap();
    until("INTA is high", || guest.vm.level(GSI));
    guest.set_common(register::DEVICE_STATUS, 1, 0);
    assert!(!guest.vm.level(GSI), "nothing is pending after a reset");
}

#[test]
fn configuration_is_read_and_written() {
    let guest = Guest::new(true, false);
    *guest.backend.config.lock() = std::array::from_fn(|at| at as u8);
    let at = guest.place(4);
    assert_eq!(guest.read(at + 4, 4), 0x0706_0504);
    guest.write(at + 5, 1, 0x55);
    assert_eq!(guest.backend.told(), [Told::WriteConfig(5, vec![0x55])]);
    assert_eq!(guest.read(at + 4, 2), 0x5504);
    assert_eq!(guest.port(20 + 4, 4), 0x0706_5504, "the same by the legacy interface");
    guest.messages();
    assert_eq!(guest.port(24 + 4, 4), 0x0706_5504, "which moves when MSI-X is on");
    guest.set_port(24, 1, 9);
    assert_eq!(guest.backend.told(), [Told::WriteConfig(0, vec![9])]);
}

#[test]
fn configuration_space_is_a_window_to_everything() {
    let guest = Guest::new(false, false);
    let (window, ..) = *guest.capabilities().last().unwrap();
    let aim = |bar: u8, offset: u64, length: u8| {
        guest.root.write_config(SLOT, window + 4, &[bar]);
        guest.root.write_config(SLOT, window + 8, &(offset as u32).to_le_bytes());
        guest.root.write_config(SLOT, window + 12, &[length, 0, 0, 0]);
    };
    aim(4, register::NUM_QUEUES, 2);
    assert_eq!(guest.config(window + 16) & 0xFFFF, 3);
    aim(4, register::DEVICE_STATUS, 1);
    guest.root.write_config(SLOT, window + 16, &[3]);
    assert_eq!(guest.common(register::DEVICE_STATUS, 1), 3);
    assert_eq!(guest.config(window + 16) & 0xFF, 3);
    // Not aligned; too wide; no such BAR; that of MSI-X; behind the end.
    for (bar, offset, length) in [(4, 1, 2), (4, 0, 3), (4, 0, 8), (6, 0, 4), (255, 0, 4), (1, 12, 4), (4, 0x4000, 1)] {
        guest.root.write_config(SLOT, window + 12, &[0; 4]);
        guest.root.write_config(SLOT, window + 16, &[0xAA; 4]);
        aim(bar, offset, length);
        guest.root.write_config(SLOT, window + 16, &[0; 4]);
        assert_eq!(guest.config(window + 16), 0, "{bar} {offset} {length}");
    }
    assert_eq!(guest.common(register::DEVICE_STATUS, 1), 3);
}

#[test]
fn a_legacy_driver_starts_it() {
    use legacy::register;
    let guest = Guest::new(true, false);
    assert_eq!(guest.port(register::DEVICE_FEATURES, 4), FEATURES as u32);
    guest.set_port(register::DEVICE_STATUS, 1, 3);
    guest.set_port(register::DRIVER_FEATURES, 4, 0b111);
    assert_eq!(guest.port(register::DRIVER_FEATURES, 4), 0b111);
    guest.set_port(register::QUEUE_SELECT, 2, 1);
    assert_eq!((guest.port(register::QUEUE_SIZE, 2), guest.port(register::QUEUE_ADDRESS, 4)), (256, 0));
    guest.set_port(register::QUEUE_ADDRESS, 4, 0x12345);
    assert_eq!(guest.port(register::QUEUE_ADDRESS, 4), 0x12345);
    guest.set_port(register::QUEUE_ADDRESS, 4, 0x23456);
    guest.set_port(register::QUEUE_SELECT, 2, 2);
    guest.set_port(register::QUEUE_ADDRESS, 4, 0x77);
    guest.set_port(register::QUEUE_ADDRESS, 4, 0);
    guest.set_port(register::DEVICE_STATUS, 1, 7);
    assert_eq!(guest.port(register::DEVICE_STATUS, 1), 7);
    let told = guest.backend.told();
    let [Told::Activate { features, queues }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(*features, 0b101, "what was not offered is not on, and VERSION_1 cannot be");
    let [queue] = queues.as_slice() else { panic!("{queues:?}") };
    assert_eq!((queue.index, queue.size), (1, 256));
    // 256 descriptors of 16 bytes, 6 + 512 bytes of available ring, the used ring at the next page.
    assert_eq!((queue.descriptor, queue.driver, queue.device), (0x2345_6000, 0x2345_7000, 0x2345_8000));
    let notify = guest.bar(0) + register::QUEUE_NOTIFY;
    assert_eq!(guest.vm.doorbells(), [Doorbell::Port { port: notify as u16, value: Some(1) }]);
    assert!(guest.vm.write_port(notify as u16, 1));
    assert_eq!(guest.kicked(), [1]);
    guest.event(1).write(1).unwrap();
    until("INTA is high", || guest.vm.level(GSI));
    assert_eq!(guest.port(register::ISR_STATUS, 1), 1);
    assert!(!guest.vm.level(GSI));
    guest.set_port(register::DEVICE_STATUS, 1, 0);
    assert_eq!((guest.backend.told(), guest.port(register::DEVICE_STATUS, 1)), (vec![Told::Reset], 0));
    guest.start();
    assert!(matches!(guest.vm.doorbells()[0], Doorbell::Address { .. }), "a modern driver may follow");
}

#[test]
fn legacy_vectors_are_there_with_messages() {
    use legacy::register;
    let guest = Guest::new(true, false);
    guest.messages();
    guest.set_port(register::QUEUE_SELECT, 2, 1);
    guest.set_port(register::QUEUE_MSIX_VECTOR, 2, 2);
    guest.set_port(register::CONFIG_MSIX_VECTOR, 2, 1);
    assert_eq!((guest.port(register::QUEUE_MSIX_VECTOR, 2), guest.port(register::CONFIG_MSIX_VECTOR, 2)), (2, 1));
    guest.set_port(register::QUEUE_ADDRESS, 4, 0x100);
    guest.set_port(register::DEVICE_STATUS, 1, 7);
    guest.event(1).write(1).unwrap();
    assert_eq!(guest.vm.messages(), [message(2)]);
}

#[test]
fn reset_is_as_after_power_on() {
    let guest = Guest::new(false, false);
    guest.messages();
    guest.start();
    guest.backend.told();
    guest.root.reset();
    assert_eq!(guest.backend.told(), [Told::Reset]);
    assert_eq!((guest.vm.doorbells(), guest.vm.routes(), guest.device.front_end().status()), (vec![], 0, 0));
}

#[test]
fn a_saved_device_goes_on() {
    for legacy in [false, true] {
        let guest = Guest::new(true, true);
        guest.messages();
        guest.set_common(register::QUEUE_SELECT, 2, 2);
        guest.set_common(register::QUEUE_MSIX_VECTOR, 2, 3);
        if legacy {
            guest.set_port(legacy::register::QUEUE_SELECT, 2, 2);
            guest.set_port(legacy::register::QUEUE_ADDRESS, 4, 0x100);
            guest.set_port(legacy::register::DEVICE_STATUS, 1, 7);
        } else {
            guest.start();
        }
        let state = serde_json::to_vec(&(guest.root.save(), guest.device.save().unwrap())).unwrap();
        let (bus, state): (_, PciTransportState) = serde_json::from_slice(&state).unwrap();

        let other = Guest::new(true, true);
        other.root.restore(&bus).unwrap();
        other.device.restore(&state).unwrap();
        assert_eq!(other.backend.told(), [], "its owner activates it");
        let (_, queues) = other.device.front_end().running_queues().unwrap();
        assert!(queues.iter().any(|queue| queue.index == 2));
        assert_eq!(other.vm.doorbells(), guest.vm.doorbells());
        assert_eq!(other.device.save().unwrap(), state);
        other.event(2).write(1).unwrap();
        assert_eq!(other.vm.messages(), [message(3)]);
    }
}

#[test]
fn a_device_without_a_slot_does_not_run() {
    let backend = NotingBackend::default();
    let vm = Arc::new(QuietVm::new());
    let device = VirtioPci::new(vm, Box::new(backend.clone()), parameters(2, 3), PciOptions::default()).unwrap();
    device.restore(&device.save().unwrap()).unwrap();
    let guest = Guest::new(false, false);
    guest.start();
    let error = device.restore(&guest.device.save().unwrap()).unwrap_err();
    assert!(error.contains("slot"), "{error}");
}

/// Bus, offset and bytes of an access.
fn access() -> impl Strategy<Value = (usize, u64, u64, usize)> {
    let offset = prop_oneof![8 => 0..0x40u64, 1 => 0..0x4000u64, 1 => 0..0x100u64];
    let value = prop_oneof![0..16u64, Just(u64::MAX), (0..64u32).prop_map(|bit| 1 << bit), any::<u64>()];
    (0..6usize, offset, value, prop_oneof![Just(1), Just(2), Just(4), Just(8)])
}

proptest! {
    #[test]
    fn whatever_is_written_only_legal_queues_run(accesses in proptest::collection::vec(access(), 1..200)) {
        let guest = Guest::new(true, true);
        guest.negotiate(feature::VERSION_1);
        for (place, offset, value, width) in accesses {
            let data = &value.to_le_bytes()[..width];
            let bars = guest.root.functions()[1].2;
            match (place, bars) {
                (0, [Some(base), ..]) => {
                    guest.ports.write(base + offset % 128, data);
                    guest.ports.read(base + offset % 128, &mut [0; 8][..width]);
                }
                (1, [_, Some(base), ..]) => drop(guest.addresses.write(base + offset % 4096, data)),
                (2, [_, _, Some(base), ..]) => drop(guest.ports.write(base + offset % 16, data)),
                (3 | 4, [_, _, _, _, Some(base), _]) => {
                    guest.addresses.write(base + offset, data);
                    guest.addresses.read(base + offset, &mut [0; 8][..width]);
                }
                _ => {
                    guest.root.write_config(SLOT, offset as usize % 256, data);
                    guest.root.read_config(SLOT, offset as usize % 256, &mut [0; 8][..width]);
                }
            }
            for told in guest.backend.told() {
                let Told::Activate { features, queues } = told else { continue };
                prop_assert_eq!(features & !FEATURES, 0);
                let packed = features & feature::RING_PACKED != 0;
                for queue in queues {
                    prop_assert!(queue.size >= 1 && queue.size <= 256 && (packed || queue.size.is_power_of_two()));
                    prop_assert_eq!(queue.descriptor % 16, 0);
                }
            }
        }
    }
}
