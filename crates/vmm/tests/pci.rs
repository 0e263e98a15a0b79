//! Configuration space, base address registers and interrupts, as PCI 3.0 has them, with a function of the test's own.

mod doubles;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use doubles::QuietVm;
use parking_lot::Mutex;
use proptest::prelude::*;
use viaduct_vmm::bus::{Bus, BusDevice, Range};
use viaduct_vmm::engine::Msi;
use viaduct_vmm::pci::{
    Bar, BarKind, Capability, ConfigPorts, Description, Ecam, Identity, MsixBar, PciError, PciFunction, PciRoot,
    PciState, Pins, Windows,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const GSIS: [u32; 4] = [5, 9, 10, 11];
const IO: u64 = 0xC000;
const MEMORY32: u64 = 0xC000_0000;
const MEMORY64: u64 = 0x4_0000_0000;

/// Three BARs and MSI-X: remembers what was written last, and where it is.
#[derive(Default)]
struct Card {
    pins: OnceLock<Arc<Pins>>,
    written: Mutex<Vec<(usize, u64, Vec<u8>)>>,
    places: Mutex<[Option<u64>; 6]>,
    resets: Mutex<u32>,
}

impl PciFunction for Card {
    fn name(&self) -> &str {
        "card"
    }

    fn describe(&self) -> Description {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 9,
            class: 0x02_00_00,
            subsystem_vendor: 0x1AF4,
            subsystem: 7,
        };
        let mut bars = [None; 6];
        bars[0] = Some(Bar { kind: BarKind::Io, size: 32 });
        bars[1] = Some(Bar { kind: BarKind::Memory32, size: 0x2_0000 });
        bars[4] = Some(Bar { kind: BarKind::Memory64, size: 0x4000 });
        let capability = Capability { id: 9, body: vec![1, 2, 3, 4], writable: vec![0, 0xF0] };
        Description {
            identity,
            bars,
            capabilities: vec![capability],
            msix: Some(MsixBar { bar: 2, vectors: 3 }),
            pin: true,
        }
    }

    fn attached(&self, pins: &Arc<Pins>) {
        assert!(self.pins.set(pins.clone()).is_ok());
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(bar as u8);
        data[0] = offset as u8;
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        self.written.lock().push((bar, offset, data.to_vec()));
    }

    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        self.places.lock()[bar] = address;
    }

    fn reset(&self) {
        *self.resets.lock() += 1;
    }
}

struct Machine {
    vm: QuietVm,
    ports: Arc<Bus>,
    addresses: Arc<Bus>,
    root: Arc<PciRoot>,
    card: Arc<Card>,
}

fn windows() -> Windows {
    Windows {
        io: Range { base: IO, last: 0xFFFF },
        memory32: Range { base: MEMORY32, last: 0xDFFF_FFFF },
        memory64: Range { base: MEMORY64, last: 0x13_FFFF_FFFF },
    }
}

impl Machine {
    fn new() -> Machine {
        let (vm, ports, addresses) = (QuietVm::new(), Arc::new(Bus::ports()), Arc::new(Bus::addresses()));
        let root = PciRoot::new(Arc::new(vm.clone()), &ports, &addresses, windows(), GSIS).unwrap();
        let card = Arc::new(Card::default());
        assert_eq!(root.add(card.clone(), Some(3)), Ok(3));
        addresses.insert(0xE000_0000, 0x1000_0000, Arc::new(Ecam::new(root.clone()))).unwrap();
        let config = Arc::new(ConfigPorts::new(root.clone(), None));
        ports.insert(ConfigPorts::BASE, ConfigPorts::SIZE, config).unwrap();
        Machine { vm, ports, addresses, root, card }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.addresses.read(0xE000_0000 + (3 << 15) + offset, &mut data));
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, data: &[u8]) {
        assert!(self.addresses.write(0xE000_0000 + (3 << 15) + offset, data));
    }

    fn command(&self, value: u16) {
        self.write(4, &value.to_le_bytes());
    }

    fn places(&self) -> [Option<u64>; 6] {
        self.root.functions()[1].2
    }

    /// The capability's offset.
    fn capability(&self, id: u8) -> u64 {
        let mut at = u64::from(self.read(0x34) & 0xFF);
        while at != 0 {
            let head = self.read(at);
            if head as u8 == id {
                return at;
            }
            at = u64::from(head >> 8 & 0xFF);
        }
        panic!("no capability {id:#x}");
    }

    fn pins(&self) -> &Pins {
        self.card.pins.get().unwrap()
    }

    fn table(&self, offset: u64, data: &[u8]) {
        let at = self.places()[2].unwrap();
        assert!(self.addresses.write(at + offset, data));
    }

    fn pending(&self) -> u64 {
        let mut data = [0; 8];
        assert!(self.addresses.read(self.places()[2].unwrap() + 2048, &mut data));
        u64::from_le_bytes(data)
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn both_ways_into_configuration_space_lead_to_the_same() {
    let machine = Machine::new();
    let read = |address: u32, port: u64, data: &mut [u8]| {
        assert!(machine.ports.write(0xCF8, &address.to_le_bytes()));
        assert!(machine.ports.read(port, data));
    };
    for offset in (0..0x100).step_by(4) {
        let mut data = [0; 4];
        read(0x8000_0000 | 3 << 11 | offset, 0xCFC, &mut data);
        assert_eq!(u32::from_le_bytes(data), machine.read(offset.into()), "{offset:#x}");
    }
    assert_eq!(machine.read(0), 0x5678_1234);
    assert_eq!(machine.read(8), 0x0200_0009);
    assert_eq!(machine.read(0x2C), 0x0007_1AF4);
    assert_eq!(machine.read(0x3C), 0x0000_010B, "INTA, and slot 3's interrupt");
    assert_eq!(machine.read(0x100), 0, "no extended capabilities");
    assert_eq!(machine.read(0xFFC), 0);
    let (mut byte, mut word, mut back) = ([0], [0; 2], [0; 4]);
    read(0x8000_1800, 0xCFD, &mut byte);
    read(0x8000_1800, 0xCFE, &mut word);
    assert_eq!((byte, word), ([0x12], [0x78, 0x56]));
    machine.ports.write(0xCF8, &[0xFF; 4]);
    machine.ports.read(0xCF8, &mut back);
    assert_eq!(u32::from_le_bytes(back), 0x80FF_FFFC);
    machine.ports.write(0xCF8, &0x8000_1804u32.to_le_bytes());
    machine.ports.write(0xCFC, &[7, 0]);
    assert_eq!(machine.read(4) & 0xFFFF, 7);
    read(0x0000_1800, 0xCFC, &mut back);
    assert_eq!(back, [0xFF; 4], "without its highest bit the address is none");
}

#[test]
fn where_nobody_is_there_are_ones() {
    let machine = Machine::new();
    for (bus, slot, function) in [(0, 1, 0), (0, 3, 1), (1, 3, 0), (255, 31, 7)] {
        let mut data = [0; 4];
        let at = 0xE000_0000 + (bus << 20 | slot << 15 | function << 12);
        machine.addresses.write(at + 4, &[7, 0]);
        assert!(machine.addresses.read(at, &mut data));
        assert_eq!(data, [0xFF; 4]);
    }
    let mut bridge = [0; 8];
    machine.addresses.read(0xE000_0008, &mut bridge[..4]);
    assert_eq!(bridge[2..4], [0, 6], "slot 0 is a host bridge");
}

#[test]
fn bars_tell_their_size_and_keep_their_kind() {
    let machine = Machine::new();
    let sized = |bar: u64| {
        let at = 0x10 + 4 * bar;
        let before = machine.read(at);
        machine.write(at, &[0xFF; 4]);
        let size = machine.read(at);
        machine.write(at, &before.to_le_bytes());
        assert_eq!(machine.read(at), before);
        size
    };
    assert_eq!([0, 1, 2, 3, 4, 5].map(sized), [0xFFE1, 0xFFFE_0000, 0xFFFF_F000, 0, 0xFFFF_C004, 0xFFFF_FFFF]);
    machine.write(0x30, &[0xFF; 4]);
    assert_eq!(machine.read(0x30), 0, "no expansion ROM");
}

#[test]
fn bars_answer_while_they_are_decoded() {
    let machine = Machine::new();
    assert_eq!(machine.places(), [None; 6], "nothing after reset");
    machine.command(1);
    assert_eq!(machine.places(), [Some(IO), None, None, None, None, None]);
    machine.command(3);
    let all = [Some(IO), Some(MEMORY32), Some(MEMORY32 + 0x2_0000), None, Some(MEMORY64), None];
    assert_eq!(machine.places(), all);
    assert_eq!(machine.card.places.lock()[4], Some(MEMORY64));
    let mut data = [0; 2];
    assert!(machine.ports.read(IO + 5, &mut data));
    assert_eq!(data, [5, 0]);
    assert!(machine.addresses.read(MEMORY64 + 0x3FFE, &mut data));
    assert_eq!(data, [0xFE, 4]);
    assert!(machine.addresses.write(MEMORY32 + 0x100, &[1, 2]));
    assert_eq!(*machine.card.written.lock(), [(1, 0x100, vec![1, 2])]);
    machine.write(0x24, &[5, 0, 0, 0]);
    assert_eq!(machine.places()[4], Some(0x5_0000_0000));
    assert!(!machine.addresses.read(MEMORY64, &mut data));
    machine.command(0);
    assert_eq!(machine.places(), [None; 6]);
    assert_eq!(*machine.card.places.lock(), [None; 6]);
    assert!(!machine.ports.read(IO, &mut data));
}

#[test]
fn a_bar_over_something_else_waits_for_room() {
    let machine = Machine::new();
    let other = Arc::new(Card::default());
    machine.root.add(other, None).unwrap();
    let second = |offset: u64, data: &[u8]| assert!(machine.addresses.write(0xE000_8000 + offset, data));
    machine.command(2);
    second(4, &[2, 0]);
    let places = || machine.root.functions()[1].2;
    assert_eq!(machine.root.functions()[1].0, 1, "the first free slot");
    let apart = places()[1].unwrap();
    second(0x14, &(MEMORY32 as u32).to_le_bytes());
    assert_eq!(places()[1], None, "the first card was there before");
    machine.write(0x14, &(apart as u32).to_le_bytes());
    assert_eq!(places()[1], Some(MEMORY32), "now it has gone");
    assert_eq!(machine.root.functions()[2].2[1], Some(apart));
    second(0x14, &0xE000_0000u32.to_le_bytes());
    assert_eq!(places()[1], None, "configuration space is not hidden by it");
    assert_eq!(machine.read(0), 0x5678_1234);
    second(0x14, &[0; 4]);
    assert_eq!(places()[1], None, "0 is no address");
}

#[test]
fn read_only_registers_stay() {
    let machine = Machine::new();
    let before: Vec<_> = (0..64).map(|word| machine.read(word * 4)).collect();
    for byte in 0..0x100 {
        if !(0x10..0x28).contains(&byte) && !(4..6).contains(&byte) {
            machine.write(byte, &[!0]);
            machine.write(byte, &[0]);
        }
    }
    let after: Vec<_> = (0..64).map(|word| machine.read(word * 4)).collect();
    let changed: Vec<_> = (0..64).filter(|&word| before[word] != after[word]).map(|word| word * 4).collect();
    assert_eq!(changed, [0x3C], "cache line size and message control were zero; only the interrupt line was not");
    let at = machine.capability(9);
    machine.write(at + 2, &[0xFF; 4]);
    assert_eq!(
        (machine.read(at) >> 16, machine.read(at + 4)),
        (0xF201, 0x0403),
        "some bits of a capability can be written"
    );
}

#[test]
fn messages_go_where_the_table_says() {
    let machine = Machine::new();
    let (first, second) = (event(), event());
    let never = || -> Arc<dyn Fn() + Send + Sync> { Arc::new(|| panic!("MSI-X is on")) };
    machine.command(6);
    let control = machine.capability(0x11) + 2;
    assert_eq!(machine.read(control - 2) >> 16, 2, "three vectors");
    machine.write(control, &[0, 0x80]);
    let numbers = [&first, &second].map(|event| machine.pins().attach(event, never()).unwrap());
    for number in numbers {
        machine.pins().set_vector(number, Some(1)).unwrap();
    }
    assert_eq!(machine.vm.routes(), 2);
    machine.table(16, &0xFEE0_1000u64.to_le_bytes());
    machine.table(24, &0x31u32.to_le_bytes());
    first.write(1).unwrap();
    assert_eq!(machine.vm.messages(), [], "masked after reset");
    assert_eq!(machine.pending(), 0b10);
    machine.table(28, &[0; 4]);
    let msi = Msi { address: 0xFEE0_1000, data: 0x31 };
    assert_eq!(machine.vm.messages(), [msi], "it was pending");
    assert_eq!(machine.pending(), 0);
    second.write(1).unwrap();
    first.write(1).unwrap();
    assert_eq!(machine.vm.messages(), [msi, msi]);
    machine.write(control, &[0, 0xC0]);
    second.write(1).unwrap();
    assert_eq!((machine.vm.messages(), machine.pending()), (vec![], 0b10), "the whole function is masked");
    machine.table(24, &0x32u32.to_le_bytes());
    machine.write(control, &[0, 0x80]);
    assert_eq!(machine.vm.messages(), [Msi { data: 0x32, ..msi }]);
    machine.pins().set_vector(numbers[0], None).unwrap();
    first.write(1).unwrap();
    assert_eq!((machine.vm.messages(), machine.vm.routes(), machine.pending()), (vec![], 1, 0));
    machine.pins().set_vector(numbers[0], Some(3)).unwrap();
    assert_eq!(machine.vm.routes(), 1, "there is no vector 3");
}

#[test]
fn the_table_is_read_as_it_was_written() {
    let machine = Machine::new();
    machine.command(2);
    let at = machine.places()[2].unwrap();
    let read = |offset, width| {
        let mut data = [0; 8];
        assert!(machine.addresses.read(at + offset, &mut data[..width]));
        u64::from_le_bytes(data)
    };
    assert_eq!(read(0x2C, 4), 1, "masked");
    machine.table(0x20, &u64::MAX.to_le_bytes());
    machine.table(0x28, &u64::MAX.to_le_bytes());
    assert_eq!((read(0x20, 8), read(0x28, 8)), (u64::MAX - 3, 0x1_FFFF_FFFF));
    machine.table(0x20, &[0, 0]);
    machine.table(0x22, &[0; 4]);
    machine.table(0x30, &[0; 8]);
    machine.table(2048, &[0xFF; 8]);
    assert_eq!((read(0x20, 8), read(0x30, 8), read(2048, 8)), (u64::MAX - 3, 0, 0));
}

#[test]
fn without_messages_an_event_becomes_a_level() {
    let machine = Machine::new();
    let event = event();
    let pins = machine.card.pins.get().unwrap();
    let asserting = Arc::downgrade(pins);
    pins.attach(&event, Arc::new(move || asserting.upgrade().unwrap().set_intx(true))).unwrap();
    let gsi = GSIS[3];
    event.write(1).unwrap();
    until("the pin is high", || machine.vm.level(gsi));
    assert_eq!(machine.read(4) >> 16 & 8, 8, "interrupt status");
    machine.command(1 << 10);
    assert!(!machine.vm.level(gsi), "disabled");
    assert_eq!(machine.read(4) >> 16 & 8, 8, "which the status does not show");
    machine.command(0);
    assert!(machine.vm.level(gsi));
    let control = machine.capability(0x11) + 2;
    machine.write(control, &[0, 0x80]);
    assert!(!machine.vm.level(gsi), "with messages there are no pins");
    event.write(1).unwrap();
    machine.pins().set_intx(false);
    machine.write(control, &[0, 0]);
    until("what came meanwhile is a level now", || machine.vm.level(gsi));
    machine.root.reset();
    assert!(!machine.vm.level(gsi));
}

#[test]
fn a_wire_is_high_while_anyone_asserts_it() {
    let machine = Machine::new();
    let other = Arc::new(Card::default());
    machine.root.add(other.clone(), Some(7)).unwrap();
    let other = other.pins.get().unwrap();
    machine.pins().set_intx(true);
    other.set_intx(true);
    machine.pins().set_intx(false);
    assert!(machine.vm.level(GSIS[3]));
    other.set_intx(false);
    assert!(!machine.vm.level(GSIS[3]));
}

#[test]
fn slots_and_windows_have_an_end() {
    let machine = Machine::new();
    for slot in [0, 3, 32, 255] {
        let error = machine.root.add(Arc::new(Card::default()), Some(slot)).unwrap_err();
        assert!(matches!(error, PciError::Slot { .. }), "{error}");
    }
    for _ in 0..30 {
        machine.root.add(Arc::new(Card::default()), None).unwrap();
    }
    assert!(matches!(machine.root.add(Arc::new(Card::default()), None), Err(PciError::Slot { .. })));

    let narrow = Windows { memory32: Range { base: MEMORY32, last: MEMORY32 + 0x1_FFFF }, ..windows() };
    let (vm, ports, addresses) = (Arc::new(QuietVm::new()), Arc::new(Bus::ports()), Arc::new(Bus::addresses()));
    let root = PciRoot::new(vm, &ports, &addresses, narrow, GSIS).unwrap();
    let error = root.add(Arc::new(Card::default()), None).unwrap_err();
    assert!(matches!(error, PciError::Window { bar: 2, .. }), "{error}");
}

#[test]
fn reset_is_as_after_power_on() {
    let machine = Machine::new();
    let before: Vec<_> = (0..64).map(|word| machine.read(word * 4)).collect();
    machine.command(0x407);
    machine.write(0x24, &[7, 0, 0, 0]);
    machine.table(0, &[4; 8]);
    machine.write(machine.capability(0x11) + 2, &[0, 0xC0]);
    machine.ports.write(0xCF8, &[0xFC; 4]);
    machine.root.reset();
    let after: Vec<_> = (0..64).map(|word| machine.read(word * 4)).collect();
    assert_eq!(before, after);
    assert_eq!((machine.places(), machine.root.config_address(), *machine.card.resets.lock()), ([None; 6], 0, 1));
    assert!(!machine.pins().messages());
}

#[test]
fn a_saved_bus_goes_on() {
    let machine = Machine::new();
    machine.command(7);
    machine.write(0x24, &[7, 0, 0, 0]);
    machine.table(16, &0xFEE0_2000u64.to_le_bytes());
    machine.table(24, &0x41u64.to_le_bytes());
    machine.write(machine.capability(0x11) + 2, &[0, 0x80]);
    let state = serde_json::to_string(&machine.root.save()).unwrap();
    let state: PciState = serde_json::from_str(&state).unwrap();

    let other = Machine::new();
    let event = event();
    let number = other.pins().attach(&event, Arc::new(|| ())).unwrap();
    other.root.restore(&state).unwrap();
    assert_eq!(other.places(), machine.places());
    assert_eq!(other.card.places.lock()[4], Some(0x7_0000_0000));
    assert_eq!(other.root.save(), state);
    other.pins().set_vector(number, Some(1)).unwrap();
    event.write(1).unwrap();
    assert_eq!(other.vm.messages(), [Msi { address: 0xFEE0_2000, data: 0x41 }]);

    let more = Machine::new();
    more.root.add(Arc::new(Card::default()), None).unwrap();
    let error = more.root.restore(&state).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the saved PCI bus has nothing in slot 1, this one card; give the machine the same devices in the same order"
    );
}

fn access() -> impl Strategy<Value = (u64, u64, usize)> {
    let offset = prop_oneof![6 => 0..0x80u64, 2 => 0..0x1000u64, 1 => any::<u64>()];
    let value = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(7),
        Just(MEMORY32),
        (0..64u32).prop_map(|bit| 1 << bit),
        any::<u64>()
    ];
    (offset, value, 1..=8usize)
}

proptest! {
    #[test]
    fn whatever_is_written_every_bar_is_where_it_says(accesses in proptest::collection::vec(access(), 1..150)) {
        let machine = Machine::new();
        let ecam = Ecam::new(machine.root.clone());
        let config = ConfigPorts::new(machine.root.clone(), None);
        for (index, (offset, value, width)) in accesses.into_iter().enumerate() {
            let data = &value.to_le_bytes()[..width];
            match index % 4 {
                0 => config.write(offset % 8, data),
                1 => drop(machine.addresses.write(machine.places()[2].unwrap_or(MEMORY32) + offset % 4096, data)),
                _ => ecam.write((3 << 15) + offset % 4096, data),
            }
            config.read(offset % 8, &mut [0; 8][..width]);
            ecam.read(offset, &mut [0; 8][..width]);
            let command = machine.read(4);
            for (bar, place) in machine.places().into_iter().enumerate() {
                let enabled = command & if bar == 0 { 1 } else { 2 } != 0;
                prop_assert!(enabled || place.is_none());
                prop_assert_eq!(place, machine.card.places.lock()[bar].or(place.filter(|_| bar == 2)));
                if let Some(place) = place {
                    prop_assert_eq!(u64::from(machine.read(0x10 + 4 * bar as u64)) & !0xF, place & 0xFFFF_FFF0);
                }
            }
        }
    }
}
