//! The devices of a PC against a guest that writes anything to their registers, and an owner who saves and restores them:
//! what was put into the serial port comes out once and in order, and a restored device answers as the one before it.

use std::sync::Arc;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_vmm::bus::BusDevice;
use viaduct_vmm::platform::serial::{INPUT_MAX, Output};
use viaduct_vmm::platform::{Line, Rtc, Serial};

use crate::quiet_vm::QuietVm;

fn port() -> Serial {
    let line = Line::new(Arc::new(QuietVm { refuses: false }), 4).expect("every machine of ours has the pin");
    Serial::new(line, Output::new(64).expect("there are descriptors"))
}

/// Writes or reads some bytes at some register; most often one byte.
fn access(u: &mut Unstructured, device: &dyn BusDevice, registers: u64) -> Result<()> {
    let offset = u.int_in_range(0..=registers)?;
    let len = *u.choose(&[1usize, 1, 1, 1, 2, 4, 8])?;
    let mut data = [0; 8];
    if u.arbitrary()? {
        u.fill_buffer(&mut data[..len])?;
        device.write(offset, &data[..len]);
    } else {
        device.read(offset, &mut data[..len]);
    }
    Ok(())
}

/// The serial port.
pub fn serial(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let mut port = port();
    while !u.is_empty() {
        match u.int_in_range(0..=9u8)? {
            0 => {
                let bytes = vec![u.arbitrary()?; u.int_in_range(0..=300)?];
                let before = port.unread();
                let taken = port.input(&bytes);
                assert!(port.unread() == before + taken && before + taken <= INPUT_MAX + 16);
            }
            1 => assert!(port.output().take().0.len() <= 64),
            2 => {
                let other = self::port();
                other.restore(port.save()).expect("a state that was saved");
                assert_eq!(other.save(), port.save());
                port = other;
            }
            3 if u.ratio(1, 8)? => port.reset(),
            _ => access(u, &port, 9)?,
        }
    }
    Ok(())
}

/// The clock.
pub fn rtc(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let mut clock = Rtc::new();
    while !u.is_empty() {
        match u.int_in_range(0..=7u8)? {
            0 => clock.set_memory(u.arbitrary()?, u.arbitrary()?),
            1 => {
                let other = Rtc::new();
                other.restore(clock.save()).expect("a state that was saved");
                assert_eq!(other.save(), clock.save());
                clock = other;
            }
            2 => {
                // Time that stands still is what was written.
                let value = u.int_in_range(0..=59u8)?;
                for (index, byte) in [(0x0B, 0x86), (0x00, value)] {
                    clock.write(0, &[index]);
                    clock.write(1, &[byte]);
                }
                let mut shown = [0];
                clock.read(1, &mut shown);
                assert_eq!(shown, [value]);
            }
            _ => access(u, &clock, 2)?,
        }
    }
    Ok(())
}
