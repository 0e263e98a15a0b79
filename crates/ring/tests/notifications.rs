//! Who wants to hear when: virtio 1.2, 2.7.7, 2.7.10, 2.8.10 and 2.8.14.

mod rig;

use rig::{DATA, Rig, config};
use viaduct_ring::{Batch, Layout, QueueConfig};

const LAYOUTS: [Layout; 2] = [Layout::Split, Layout::Packed];

/// Sends `count` buffers; returns whether the device wants a kick.
fn send(rig: &mut Rig, count: usize) -> bool {
    for _ in 0..count {
        assert_eq!(rig.driver.add(&[(DATA, 1)], &[], 0), Ok(true));
    }
    rig.driver.publish()
}

/// The device uses `count` buffers; returns whether the driver wants a call.
fn answer(rig: &mut Rig, count: usize) -> bool {
    let mut batch = Batch::default();
    assert_eq!(rig.device.peek(&mut batch, count), Ok(count));
    rig.device.consume(&batch.chains);
    rig.device.complete_all(&batch.chains);
    rig.device.publish()
}

fn receive(rig: &mut Rig, count: usize) {
    assert_eq!(rig.driver.take_many(&mut Vec::new(), count), Ok(count));
}

#[test]
fn flags_suppress_everything_or_nothing() {
    for layout in LAYOUTS {
        let mut rig = Rig::new(&config(layout, 8));
        for wanted in [true, false, true, true, false] {
            if wanted {
                rig.device.enable_notifications();
                rig.driver.enable_notifications();
            } else {
                rig.device.disable_notifications();
                rig.driver.disable_notifications();
            }
            assert_eq!(send(&mut rig, 3), wanted);
            assert_eq!(answer(&mut rig, 2), wanted);
            assert_eq!(answer(&mut rig, 1), wanted);
            receive(&mut rig, 3);
        }
    }
}

#[test]
fn nothing_published_is_nothing_to_hear_of() {
    for layout in LAYOUTS {
        let mut rig = Rig::new(&config(layout, 8));
        assert!(!rig.driver.publish());
        assert!(!rig.device.publish());
    }
}

#[test]
fn an_event_index_is_heard_once() {
    for layout in LAYOUTS {
        for base in 0..16 {
            let config = QueueConfig { event_idx: true, ..config(layout, 7 + u32::from(layout == Layout::Split)) };
            let mut rig = Rig::new(&config);
            // Go to some place in the ring; the first publication of a device is always announced.
            for _ in 0..=base {
                send(&mut rig, 1);
                answer(&mut rig, 1);
                receive(&mut rig, 1);
            }
            assert!(!rig.device.enable_notifications());
            assert!(!rig.driver.enable_notifications());
            assert!(send(&mut rig, 1), "the device waits for the next buffer");
            assert!(!send(&mut rig, 2), "it has been told");
            assert!(answer(&mut rig, 2), "the driver waits for the next buffer");
            assert!(!answer(&mut rig, 1), "it has been told");
            assert!(rig.driver.enable_notifications(), "there is something already");
            assert!(!rig.device.enable_notifications(), "all are consumed");
            receive(&mut rig, 3);
            rig.device.disable_notifications();
            rig.driver.disable_notifications();
            assert!(!rig.driver.enable_notifications());
            rig.driver.disable_notifications();
            if layout == Layout::Packed {
                assert!(!send(&mut rig, 4) && !answer(&mut rig, 4), "both poll");
            }
        }
    }
}

#[test]
fn the_first_publication_is_always_announced() {
    // Whoever served the ring before may have been killed between publishing and notifying.
    for layout in LAYOUTS {
        let config = QueueConfig { event_idx: true, ..config(layout, 8) };
        let mut rig = Rig::new(&config);
        assert!(!rig.driver.enable_notifications());
        send(&mut rig, 5);
        assert!(answer(&mut rig, 1));
        assert!(!answer(&mut rig, 1), "the driver waits for buffer 0 only");
        rig.device.publish();
        let config = QueueConfig { base: rig.device.base(), ..config };
        rig.device = viaduct_ring::DeviceQueue::new(rig.memory.clone(), &config).unwrap();
        assert!(answer(&mut rig, 1));
        assert!(!answer(&mut rig, 1));
    }
}

#[test]
fn fields_are_written_where_the_specification_has_them() {
    let split = QueueConfig { event_idx: true, base: 65534, ..config(Layout::Split, 8) };
    let mut rig = Rig::new(&split);
    rig.device.enable_notifications();
    rig.driver.enable_notifications();
    assert_eq!(rig.get_u16(split.device_addr + 4 + 8 * 8), 65534, "avail_event");
    assert_eq!(rig.get_u16(split.driver_addr + 4 + 2 * 8), 65534, "used_event");
    assert!(send(&mut rig, 3) && answer(&mut rig, 3), "over the end of the index");
    receive(&mut rig, 3);
    assert_eq!((rig.device.base(), rig.driver.base()), (1, 1));
    rig.device.disable_notifications();
    rig.driver.disable_notifications();
    assert_eq!(rig.get_u16(split.device_addr), 0, "flags stay 0 (2.7.10.2)");
    assert_eq!(rig.get_u16(split.driver_addr), 0, "flags stay 0 (2.7.7.1)");

    let split = config(Layout::Split, 8);
    let mut rig = Rig::new(&split);
    rig.device.disable_notifications();
    rig.driver.disable_notifications();
    assert_eq!((rig.get_u16(split.device_addr), rig.get_u16(split.driver_addr)), (1, 1));
    rig.device.enable_notifications();
    rig.driver.enable_notifications();
    assert_eq!((rig.get_u16(split.device_addr), rig.get_u16(split.driver_addr)), (0, 0));

    for event_idx in [false, true] {
        let packed = QueueConfig { event_idx, ..config(Layout::Packed, 3) };
        let mut rig = Rig::new(&packed);
        send(&mut rig, 3);
        answer(&mut rig, 3);
        receive(&mut rig, 3);
        send(&mut rig, 2);
        answer(&mut rig, 1);
        receive(&mut rig, 1);
        rig.device.enable_notifications();
        rig.driver.enable_notifications();
        // The device's next available descriptor and the driver's next used one: index 1, wrap counter 0.
        let expected = if event_idx { [1, 0, 2, 0] } else { [0; 4] };
        assert_eq!(rig.read(packed.device_addr, 4), expected);
        assert_eq!(rig.read(packed.driver_addr, 4), expected);
        rig.device.disable_notifications();
        rig.driver.disable_notifications();
        assert_eq!(rig.read(packed.device_addr, 4), [0, 0, 1, 0]);
        assert_eq!(rig.read(packed.driver_addr, 4), [0, 0, 1, 0]);
    }
}

#[test]
fn a_descriptor_event_without_the_feature_is_no_reason_for_silence() {
    let packed = config(Layout::Packed, 4);
    for reserved in [2u8, 3] {
        let mut rig = Rig::new(&packed);
        rig.write(packed.driver_addr, &[9, 0, reserved, 0]);
        rig.write(packed.device_addr, &[9, 0, reserved, 0]);
        assert!(send(&mut rig, 1));
        assert!(answer(&mut rig, 1));
    }
}
