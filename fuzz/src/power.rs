//! The devices by which a guest ends, resets or laments: a guest writes anything to them, and their owner saves and restores
//! them meanwhile. Nothing is asked of the owner but by a write, and a restored device answers as the one before it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use viaduct_vmm::bus::BusDevice;
use viaduct_vmm::platform::{DebugExit, I8042, Owner, Pvpanic, Request, ResetControl, SleepControl};

/// Status and data port of the keyboard controller, and how many bytes it may have for a guest that asks for none.
const KEYBOARD_STATUS: u64 = 4;
const KEYBOARD_DATA: u64 = 0;
const KEYBOARD_BYTES_MAX: usize = 32;

#[derive(Default)]
struct Counted(AtomicUsize);

impl Owner for Counted {
    fn request(&self, _: &str, _: Request) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a register says, read in one of the widths that processors have.
fn read(device: &dyn BusDevice, offset: u64, len: usize) -> [u8; 8] {
    let mut data = [0; 8];
    device.read(offset, &mut data[..len]);
    data
}

/// The target.
pub fn run(data: &[u8]) -> Result<()> {
    let u = &mut Unstructured::new(data);
    let asked = Arc::new(Counted::default());
    let owner: Arc<dyn Owner> = asked.clone();
    let (exit, panic) = (DebugExit::new(owner.clone()), Pvpanic::new(owner.clone()));
    let mut keyboard = I8042::new(owner.clone());
    let mut reset = ResetControl::new(owner.clone());
    let mut sleep = SleepControl::new(owner.clone());
    while !u.is_empty() {
        let before = asked.0.load(Ordering::Relaxed);
        let device: &dyn BusDevice = match u.int_in_range(0..=7u8)? {
            0 => {
                let others =
                    (I8042::new(owner.clone()), ResetControl::new(owner.clone()), SleepControl::new(owner.clone()));
                others.0.restore(keyboard.save());
                others.1.restore(reset.save());
                others.2.restore(sleep.save());
                assert_eq!(
                    (others.0.save(), others.1.save(), others.2.save()),
                    (keyboard.save(), reset.save(), sleep.save())
                );
                (keyboard, reset, sleep) = others;
                assert_eq!(asked.0.load(Ordering::Relaxed), before, "a state that is put back asks for nothing");
                continue;
            }
            1 => {
                // A guest that empties the keyboard controller comes to an end.
                let full = |keyboard: &I8042| read(keyboard, KEYBOARD_STATUS, 1)[0] & 1 != 0;
                let bytes = (0..).take_while(|_| full(&keyboard) && read(&keyboard, KEYBOARD_DATA, 1).len() == 8);
                assert!(bytes.take(KEYBOARD_BYTES_MAX + 1).count() <= KEYBOARD_BYTES_MAX);
                continue;
            }
            2 => &exit,
            3 => &panic,
            4 | 5 => &keyboard,
            6 => &reset,
            _ => &sleep,
        };
        let offset = u.int_in_range(0..=5)?;
        let len = *u.choose(&[1usize, 1, 1, 1, 2, 4, 8])?;
        if u.arbitrary()? {
            let mut data = [0; 8];
            u.fill_buffer(&mut data[..len])?;
            device.write(offset, &data[..len]);
            // A panic may be two things at once: that there is one, and that a crash kernel is loaded.
            assert!(asked.0.load(Ordering::Relaxed) <= before + 2 * len, "a byte asks for little");
        } else {
            read(device, offset, len);
            assert_eq!(asked.0.load(Ordering::Relaxed), before, "reading asks for nothing");
        }
    }
    Ok(())
}
