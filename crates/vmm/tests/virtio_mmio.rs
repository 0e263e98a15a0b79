//! The registers of virtio-mmio, as the rules of virtio 1.2, 4.2 and 3.1 have them.

mod doubles;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use doubles::{NotingBackend, QuietVm, Told};
use proptest::prelude::*;
use viaduct_vmm::bus::BusDevice;
use viaduct_vmm::engine::Doorbell;
use viaduct_vmm::virtio::mmio::{MmioState, SIZE, VirtioMmio, register};
use viaduct_vmm::virtio::{Parameters, feature, status};

const ADDRESS: u64 = 0xFEB0_0000;
const GSI: u32 = 16;
const FEATURES: u64 = feature::VERSION_1 | feature::RING_PACKED | 0b101;
const NEGOTIATED: u32 = 11;

struct Guest {
    vm: QuietVm,
    backend: NotingBackend,
    device: VirtioMmio,
}

impl Guest {
    fn on(vm: QuietVm) -> Guest {
        let backend = NotingBackend::default();
        let parameters = Parameters {
            name: "virtio-test".to_owned(),
            device_id: 4,
            features: FEATURES | feature::NOT_OURS,
            queue_sizes: vec![256, 64],
            config: vec![0; 16],
        };
        let device =
            VirtioMmio::new(Arc::new(vm.clone()), Box::new(backend.clone()), parameters, ADDRESS, GSI).unwrap();
        Guest { vm, backend, device }
    }

    fn new() -> Guest {
        Guest::on(QuietVm::new())
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xAA; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn accept(&self, features: u64) {
        for window in 0..2 {
            self.write(register::DRIVER_FEATURES_SEL, window);
            self.write(register::DRIVER_FEATURES, (features >> (32 * window)) as u32);
        }
    }

    fn negotiate(&self, features: u64) -> bool {
        self.write(register::STATUS, 1);
        self.write(register::STATUS, 3);
        self.accept(features);
        self.write(register::STATUS, NEGOTIATED);
        self.read(register::STATUS) == NEGOTIATED
    }

    fn set_up(&self, index: u32, size: u32, descriptor: u64) {
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_SIZE, size);
        for (at, address) in [
            (register::QUEUE_DESC_LOW, descriptor),
            (register::QUEUE_DRIVER_LOW, descriptor + 0x1_0000),
            (register::QUEUE_DEVICE_LOW, descriptor + 0x2_0000),
        ] {
            self.write(at, address as u32);
            self.write(at + 4, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
    }

    fn start(&self) {
        assert!(self.negotiate(feature::VERSION_1));
        self.set_up(0, 128, 0x1_2345_0000);
        self.set_up(1, 64, 0x8000);
        self.write(register::STATUS, 15);
    }

    fn complaint(&self) -> String {
        match self.backend.told().as_slice() {
            [Told::Error(text)] => text.clone(),
            other => panic!("one complaint was expected, not {other:?}"),
        }
    }
}

#[test]
fn it_says_who_it_is() {
    let guest = Guest::new();
    assert_eq!(guest.read(register::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(guest.read(register::VERSION), 2);
    assert_eq!(guest.read(register::DEVICE_ID), 4);
    assert_eq!(guest.read(register::STATUS), 0);
    assert_eq!(guest.read(register::SHM_LEN_LOW), u32::MAX, "no shared memory");
    assert_eq!(guest.read(register::SHM_BASE_HIGH), u32::MAX);
}

#[test]
fn features_come_in_windows() {
    let guest = Guest::new();
    let windows = [0, 1, 2, 3, u32::MAX].map(|window| {
        guest.write(register::DEVICE_FEATURES_SEL, window);
        guest.read(register::DEVICE_FEATURES)
    });
    let offered = FEATURES;
    assert_eq!(windows, [offered as u32, (offered >> 32) as u32, 0, 0, 0], "those that are not ours are left out");
}

#[test]
fn only_what_was_offered_is_agreed_upon() {
    for features in [feature::VERSION_1 | 2, 1, 0, feature::VERSION_1 | 1 << 38, feature::VERSION_1 | 1 << 40] {
        let guest = Guest::new();
        assert!(!guest.negotiate(features), "{features:#x}");
        assert_eq!(guest.read(register::STATUS), 3, "FEATURES_OK reads as zero");
        assert!(guest.complaint().contains("virtio 1.2"));
        assert!(guest.negotiate(feature::VERSION_1 | 1), "the driver may try again with fewer");
    }
    let guest = Guest::new();
    guest.write(register::DRIVER_FEATURES_SEL, 7);
    guest.write(register::DRIVER_FEATURES, 1);
    assert!(!guest.negotiate(feature::VERSION_1), "there is no feature 224");
}

#[test]
fn agreed_features_stay() {
    let guest = Guest::new();
    assert!(guest.negotiate(feature::VERSION_1));
    guest.accept(u64::MAX);
    guest.write(register::STATUS, 15);
    assert_eq!(guest.backend.told(), [Told::Activate { features: feature::VERSION_1, queues: vec![] }]);
}

#[test]
fn the_back_end_gets_what_the_driver_set_up() {
    let guest = Guest::new();
    guest.start();
    let told = guest.backend.told();
    let [Told::Activate { features, queues }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(*features, feature::VERSION_1);
    let (first, second) = (queues[0], queues[1]);
    assert_eq!((first.index, first.size, first.descriptor), (0, 128, 0x1_2345_0000));
    assert_eq!((first.driver, first.device), (0x1_2346_0000, 0x1_2347_0000));
    assert_eq!((second.index, second.size), (1, 64));
    let events = guest.device.front_end().events();
    assert_eq!((second.kick, second.call), (events[1].kick.as_raw_fd(), events[1].call.as_raw_fd()));
    assert_eq!(guest.read(register::STATUS), 15);
    assert_eq!(guest.device.front_end().running_queues(), Ok((*features, queues.clone())));
}

#[test]
fn queues_that_are_not_enabled_do_not_run() {
    let guest = Guest::new();
    assert!(guest.negotiate(feature::VERSION_1));
    guest.set_up(1, 8, 0x4000);
    guest.write(register::STATUS, 15);
    let told = guest.backend.told();
    let [Told::Activate { queues, .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(queues.iter().map(|queue| queue.index).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_queue_that_is_none_is_not_enabled() {
    for (size, descriptor, features) in [
        (0, 0x1000, 0),
        (3, 0x1000, 0),
        (512, 0x1000, 0),
        (0x1_0040, 0x1000, 0),
        (u32::MAX, 0x1000, 0),
        (64, 0x1008, 0),
        (64, u64::MAX - 15 - 0x2_0000, 0),
        (0, 0x1000, feature::RING_PACKED),
        (257, 0x1000, feature::RING_PACKED),
    ] {
        let guest = Guest::new();
        assert!(guest.negotiate(feature::VERSION_1 | features));
        guest.set_up(0, size, descriptor);
        assert_eq!(guest.read(register::QUEUE_READY), 0, "{size} {descriptor:#x}");
        assert!(guest.complaint().contains("queue 0"));
    }
    let guest = Guest::new();
    assert!(guest.negotiate(feature::VERSION_1 | feature::RING_PACKED));
    guest.set_up(0, 3, 0x1000);
    assert_eq!(guest.read(register::QUEUE_READY), 1, "a packed ring may have any size");
}

#[test]
fn there_are_as_many_queues_as_there_are() {
    let guest = Guest::new();
    let sizes = [0, 1, 2, 0x1_0000, u32::MAX].map(|index| {
        guest.write(register::QUEUE_SEL, index);
        guest.write(register::QUEUE_READY, 1);
        guest.read(register::QUEUE_SIZE_MAX)
    });
    assert_eq!(sizes, [256, 64, 0, 0, 0]);
}

#[test]
fn an_enabled_queue_does_not_change() {
    let guest = Guest::new();
    assert!(guest.negotiate(feature::VERSION_1));
    guest.set_up(0, 16, 0x4000);
    guest.write(register::QUEUE_SIZE, 32);
    guest.write(register::QUEUE_DESC_LOW, 0x6000);
    guest.write(register::STATUS, 15);
    guest.write(register::QUEUE_SEL, 1);
    guest.write(register::QUEUE_READY, 1);
    assert_eq!(guest.read(register::QUEUE_READY), 0, "and none comes while the device runs");
    let told = guest.backend.told();
    let [Told::Activate { queues, .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!((queues.len(), queues[0].size, queues[0].descriptor), (1, 16, 0x4000));
}

#[test]
fn a_queue_can_be_disabled_before_it_runs() {
    let guest = Guest::new();
    assert!(guest.negotiate(feature::VERSION_1));
    guest.set_up(0, 16, 0x4000);
    guest.write(register::QUEUE_READY, 0);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    guest.set_up(0, 32, 0x4000);
    assert_eq!(guest.read(register::QUEUE_READY), 1);
}

#[test]
fn driver_ok_needs_features_ok() {
    let guest = Guest::new();
    guest.write(register::STATUS, 7);
    assert_eq!(guest.read(register::STATUS), 7 | u32::from(status::DEVICE_NEEDS_RESET));
    assert!(guest.complaint().contains("FEATURES_OK"));
}

#[test]
fn bits_of_the_status_stay_until_reset() {
    let guest = Guest::new();
    guest.write(register::STATUS, 3);
    guest.write(register::STATUS, 1);
    assert_eq!(guest.read(register::STATUS), 3);
    guest.write(register::STATUS, 0x40);
    assert_eq!(guest.read(register::STATUS), 3, "DEVICE_NEEDS_RESET is the device's");
    guest.write(register::STATUS, 0x80);
    assert_eq!(guest.read(register::STATUS), 0x83);
    guest.write(register::STATUS, 0);
    assert_eq!(guest.read(register::STATUS), 0);
    assert_eq!(guest.backend.told(), [], "it never ran: nothing to reset");
}

#[test]
fn a_device_that_cannot_start_says_so() {
    let guest = Guest::new();
    *guest.backend.refusal.lock() = Some("the disk has gone".to_owned());
    guest.start();
    assert_eq!(guest.read(register::STATUS), 15 | 0x40);
    assert_eq!(guest.read(register::INTERRUPT_STATUS) & 2, 2);
    assert_eq!(guest.vm.pulses(GSI), 1);
    let told = guest.backend.told();
    assert!(matches!(&told[1], Told::Error(text) if text == "the disk has gone"), "{told:?}");
    guest.write(register::STATUS, 0);
    assert_eq!(guest.backend.told(), [Told::Reset], "what it began is ended");
}

#[test]
fn reset_forgets_everything() {
    let guest = Guest::new();
    guest.start();
    guest.device.config_changed(&[1]).unwrap();
    guest.backend.told();
    guest.write(register::STATUS, 0);
    assert_eq!(guest.backend.told(), [Told::Reset]);
    assert_eq!(guest.read(register::STATUS), 0);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 0);
    guest.write(register::QUEUE_SEL, 0);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    assert_eq!(guest.read(register::QUEUE_SIZE_MAX), 256);
    guest.start();
    assert!(matches!(guest.backend.told().as_slice(), [Told::Activate { .. }]), "and it can start again");
    assert_eq!(guest.vm.doorbells().len(), 2, "with the doorbells it had");
}

#[test]
fn doorbells_ring_without_the_bus() {
    let guest = Guest::new();
    assert_eq!(guest.vm.doorbells(), []);
    guest.start();
    let at = |value| Doorbell::Address { address: ADDRESS + 0x50, value: Some(value) };
    assert_eq!(guest.vm.doorbells(), [at(0), at(1)]);
    assert!(guest.vm.write_address(ADDRESS + 0x50, 1));
    let events = guest.device.front_end().events();
    assert_eq!(events[1].kick.read().unwrap(), 1);
    assert!(events[0].kick.read().is_err());
}

#[test]
fn without_doorbells_the_register_rings() {
    let guest = Guest::on(QuietVm::without_doorbells());
    let events = guest.device.front_end().events();
    guest.write(register::QUEUE_NOTIFY, 0);
    assert!(events[0].kick.read().is_err(), "nothing runs yet");
    guest.start();
    for index in [0, 2, 0x1_0000, u32::MAX] {
        guest.write(register::QUEUE_NOTIFY, index);
    }
    assert_eq!(events[0].kick.read().unwrap(), 1);
    assert!(events[1].kick.read().is_err());
}

#[test]
fn a_used_buffer_pulses_the_line() {
    let guest = Guest::new();
    guest.start();
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 1, "it may always be so");
    guest.device.front_end().events()[1].call.write(1).unwrap();
    assert_eq!(guest.vm.pulses(GSI), 1);
    guest.write(register::INTERRUPT_ACK, 1);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 1);
}

#[test]
fn another_configuration_interrupts_once() {
    let guest = Guest::new();
    guest.device.config_changed(&[1, 2, 3, 4]).unwrap();
    assert_eq!(guest.vm.pulses(GSI), 0, "nobody listens yet");
    guest.start();
    let generation = guest.read(register::CONFIG_GENERATION);
    guest.device.config_changed(&[1, 2, 3, 4]).unwrap();
    assert_eq!((guest.vm.pulses(GSI), guest.read(register::CONFIG_GENERATION)), (0, generation), "it is the same");
    guest.device.config_changed(&[5, 6, 7]).unwrap();
    assert_eq!(guest.vm.pulses(GSI), 1);
    assert_ne!(guest.read(register::CONFIG_GENERATION), generation);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 3);
    assert_eq!(guest.read(register::CONFIG), 0x0007_0605, "behind its end are zeroes");
    guest.write(register::INTERRUPT_ACK, 2);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 1);
    assert!(guest.device.config_changed(&[0; 5000]).is_err());
}

/// An acknowledgement is posted: another change may come before it arrives.
#[test]
fn an_acknowledgement_is_about_what_the_driver_has_seen() {
    let guest = Guest::new();
    guest.start();
    guest.device.config_changed(&[5, 6, 7]).unwrap();
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 3);
    guest.device.config_changed(&[8, 9]).unwrap();
    guest.write(register::INTERRUPT_ACK, 3);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 3, "of the second change it knows nothing yet");
    guest.write(register::INTERRUPT_ACK, 3);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 1);
}

#[test]
fn a_device_may_ask_for_a_reset() {
    let guest = Guest::new();
    guest.start();
    guest.device.needs_reset();
    assert_eq!(guest.read(register::STATUS), 15 | 0x40);
    assert_eq!((guest.read(register::INTERRUPT_STATUS), guest.vm.pulses(GSI)), (3, 1));
}

#[test]
fn configuration_is_read_and_written_in_any_width() {
    let guest = Guest::new();
    *guest.backend.config.lock() = std::array::from_fn(|at| at as u8);
    guest.device.config_changed(&*guest.backend.config.lock()).unwrap();
    for (offset, width) in [(0, 1), (3, 2), (4, 4), (8, 8), (14, 4)] {
        let mut data = vec![0xAA; width];
        guest.device.read(register::CONFIG + offset, &mut data);
        let expected: Vec<_> = (offset..).take(width).map(|at| if at < 16 { at as u8 } else { 0 }).collect();
        assert_eq!(data, expected);
    }
    guest.device.write(register::CONFIG + 6, &[0x55, 0x66]);
    assert_eq!(guest.backend.told(), [Told::WriteConfig(6, vec![0x55, 0x66])]);
    assert_eq!(guest.read(register::CONFIG + 4), 0x6655_0504, "what is kept is what the device says");
    guest.device.write(register::CONFIG + 15, &[1, 2]);
    guest.device.write(SIZE - 1, &[1]);
    assert_eq!(guest.backend.told(), [], "behind the end is nothing");
}

#[test]
fn registers_are_of_32_bits() {
    let guest = Guest::new();
    for width in [1, 2, 8] {
        let mut data = vec![0xAA; width];
        guest.device.read(register::MAGIC_VALUE, &mut data);
        assert_eq!(data, vec![0; width]);
        guest.device.write(register::STATUS, &[1, 0, 0, 0, 0, 0, 0, 0][..width]);
    }
    guest.device.write(register::STATUS + 1, &[1, 1, 1, 1]);
    assert_eq!(guest.read(register::STATUS), 0);
    for offset in [0x18, 0x2C, 0x54, 0xC0, 0xF8, register::STATUS + 2] {
        assert_eq!(guest.read(offset), 0, "{offset:#x}");
    }
}

#[test]
fn complaints_are_few() {
    let guest = Guest::new();
    for _ in 0..1000 {
        guest.negotiate(2);
        guest.write(register::STATUS, 0);
    }
    assert_eq!(guest.backend.told().len(), 16);
}

#[test]
fn a_saved_device_goes_on() {
    let guest = Guest::new();
    guest.start();
    guest.device.config_changed(&[9]).unwrap();
    let state = serde_json::to_string(&guest.device.save().unwrap()).unwrap();
    let state: MmioState = serde_json::from_str(&state).unwrap();

    let other = Guest::new();
    other.device.front_end().set_config(&[9]).unwrap();
    other.device.restore(&state).unwrap();
    assert_eq!(other.backend.told(), [], "its owner activates it");
    let (features, queues) = other.device.front_end().running_queues().unwrap();
    assert_eq!((features, queues.len(), queues[0].descriptor), (feature::VERSION_1, 2, 0x1_2345_0000));
    assert_eq!(other.device.save().unwrap(), state);
    assert_eq!((other.read(register::STATUS), other.read(register::INTERRUPT_STATUS)), (15, 3));
    assert_eq!(other.vm.doorbells().len(), 2);
    other.write(register::STATUS, 0);
    assert_eq!(other.backend.told(), [Told::Reset]);
}

#[test]
fn a_device_is_saved_in_the_middle_of_negotiation() {
    for status in [3, 7] {
        let guest = Guest::new();
        guest.accept(u64::MAX);
        guest.write(register::STATUS, status);
        let state = guest.device.save().unwrap();
        let other = Guest::new();
        other.device.restore(&state).unwrap();
        assert_eq!(other.read(register::STATUS), guest.read(register::STATUS));
        let (_, queues) = other.device.front_end().running_queues().unwrap();
        assert_eq!(queues, [], "a device that could not start serves nothing");
    }
}

#[test]
fn a_state_of_another_device_is_refused() {
    let guest = Guest::new();
    guest.start();
    let state = guest.device.save().unwrap();
    for (features, sizes) in [(FEATURES, vec![256]), (FEATURES, vec![64, 64])] {
        let parameters =
            Parameters { name: "other".to_owned(), device_id: 4, features, queue_sizes: sizes, config: vec![] };
        let backend = Box::new(NotingBackend::default());
        let other = VirtioMmio::new(Arc::new(QuietVm::new()), backend, parameters, ADDRESS, GSI).unwrap();
        let error = other.restore(&state).unwrap_err();
        assert!(error.contains("queue"), "{error}");
        assert_eq!(other.front_end().status(), 0);
    }
}

#[test]
fn a_device_that_cannot_be_is_refused() {
    for (sizes, address) in [(vec![3], ADDRESS), (vec![0], ADDRESS), (vec![8], u64::MAX - 0x100)] {
        let parameters =
            Parameters { name: "bad".to_owned(), device_id: 4, features: 0, queue_sizes: sizes, config: vec![] };
        let backend = Box::new(NotingBackend::default());
        assert!(VirtioMmio::new(Arc::new(QuietVm::new()), backend, parameters, address, GSI).is_err());
    }
}

fn access() -> impl Strategy<Value = (u64, u64, usize)> {
    let offset = prop_oneof![4 => (0..SIZE / 4).prop_map(|word| word * 4), 1 => 0..SIZE, 1 => any::<u64>()];
    let small = prop_oneof![0..16u64, Just(0x8000), any::<u64>(), (0..64u32).prop_map(|bit| 1 << bit)];
    (offset, small, prop_oneof![6 => Just(4), 1 => 1..=8usize])
}

fn queue_access() -> impl Strategy<Value = (u64, u64, usize)> {
    let registers = [0x30, 0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4];
    let value = prop_oneof![4 => 0..3u64, 2 => (0..64u32).prop_map(|bit| 1 << bit), 1 => any::<u64>()];
    (proptest::sample::select(registers.to_vec()), value, Just(4))
}

proptest! {
    #[test]
    fn whatever_is_written_only_legal_queues_run(
        packed in any::<bool>(),
        queues in proptest::collection::vec(queue_access(), 0..40),
        anything in proptest::collection::vec(access(), 0..100),
    ) {
        let guest = Guest::new();
        let layout = if packed { feature::RING_PACKED } else { 0 };
        prop_assert!(guest.negotiate(feature::VERSION_1 | layout));
        let start = (register::STATUS, 15, 4);
        for (offset, value, width) in queues.into_iter().chain([start]).chain(anything) {
            guest.device.write(offset, &value.to_le_bytes()[..width]);
            guest.device.read(offset, &mut [0; 8][..width]);
            for told in guest.backend.told() {
                let Told::Activate { features, queues } = told else { continue };
                prop_assert_eq!(features & !FEATURES, 0);
                prop_assert_ne!(features & feature::VERSION_1, 0);
                for queue in queues {
                    let packed = features & feature::RING_PACKED != 0;
                    prop_assert!(queue.size >= 1 && queue.size <= [256, 64][usize::from(queue.index)]);
                    prop_assert!(packed || queue.size.is_power_of_two());
                    prop_assert_eq!(queue.descriptor % 16, 0);
                    prop_assert!(queue.descriptor.checked_add(16 * u64::from(queue.size)).is_some());
                }
            }
        }
    }
}
