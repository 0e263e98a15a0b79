//! The I/O interrupt controller against a guest that writes anything to it, and devices that drive any pin: what is sent goes
//! to a local APIC, a masked pin sends nothing, one that is level-triggered waits for the end of its interrupt, and a restored
//! controller sends as the one before it.

use std::sync::Arc;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use parking_lot::Mutex;
use viaduct_vmm::bus::BusDevice;
use viaduct_vmm::engine::Msi;
use viaduct_vmm::engine::ioapic::{IoApic, PINS, Wires};

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END_OF_INTERRUPT: u64 = 0x40;
const REDIRECTION: u8 = 0x10;
/// Of the lower half of a redirection entry (82093AA, 3.2.4).
const REMOTE_IRR: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;

#[derive(Default)]
struct Sent(Mutex<Vec<Msi>>);

impl Wires for Sent {
    fn send(&self, msi: Msi) {
        assert_eq!(msi.address >> 20, 0xFEE, "local APICs are there");
        self.0.lock().push(msi);
    }

    fn route(&self, pin: u32, msi: Option<Msi>) {
        assert!((pin as usize) < PINS);
        assert!(msi.is_none_or(|msi| msi.address >> 20 == 0xFEE));
    }
}

/// The lower half of a pin's entry, and the selection as it was before.
fn entry(controller: &IoApic, pin: u32) -> u32 {
    let mut selected = [0; 4];
    controller.read(SELECT, &mut selected);
    controller.write(SELECT, &[REDIRECTION + 2 * pin as u8]);
    let mut data = [0; 4];
    controller.read(WINDOW, &mut data);
    controller.write(SELECT, &selected[..1]);
    u32::from_le_bytes(data)
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let sent = Arc::new(Sent::default());
    let mut controller = IoApic::new(sent.clone());
    while !u.is_empty() {
        sent.0.lock().clear();
        match u.int_in_range(0..=7u8)? {
            0 => {
                let other = IoApic::new(sent.clone());
                other.restore(&controller.save());
                assert_eq!(other.save(), controller.save());
                assert!(sent.0.lock().is_empty(), "a state that is put back sends nothing");
                controller = other;
            }
            1 => controller.end_of_interrupt(u.arbitrary()?),
            2..=4 => {
                let pin = u.int_in_range(0..=PINS as u32 + 2)?;
                let before = if (pin as usize) < PINS { entry(&controller, pin) } else { MASKED };
                controller.set_line(pin, u.arbitrary()?);
                let count = sent.0.lock().len();
                assert!(count <= 1);
                let may = before & MASKED == 0 && before & (LEVEL | REMOTE_IRR) != LEVEL | REMOTE_IRR;
                assert!(may || count == 0, "pin {pin}, whose entry is {before:#x}");
            }
            _ => {
                let offset = *u.choose(&[SELECT, SELECT, WINDOW, WINDOW, WINDOW, END_OF_INTERRUPT, 0x44, 0xFFF])?;
                let len = *u.choose(&[4usize, 4, 4, 1, 2, 8])?;
                let mut data = [0; 8];
                if u.arbitrary()? {
                    u.fill_buffer(&mut data[..len])?;
                    controller.write(offset, &data[..len]);
                } else {
                    controller.read(offset, &mut data[..len]);
                }
                let count = sent.0.lock().len();
                assert!(count <= if offset == END_OF_INTERRUPT { PINS } else { 1 });
            }
        }
    }
    Ok(())
}
