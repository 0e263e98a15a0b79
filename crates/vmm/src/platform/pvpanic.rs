//! The paravirtual panic device (QEMU, `docs/specs/pvpanic`): one port, by custom 0x505. It reads as the events that may be
//! reported, and a kernel that panics writes the one that happened. Linux finds it by its ACPI name QEMU0001.

use std::sync::Arc;

use super::{Owner, Request, value};
use crate::bus::BusDevice;

const PANICKED: u32 = 1 << 0;
const CRASH_LOADED: u32 = 1 << 1;

/// The device.
pub struct Pvpanic {
    owner: Arc<dyn Owner>,
}

impl Pvpanic {
    /// Tells `owner` of a panic.
    pub fn new(owner: Arc<dyn Owner>) -> Pvpanic {
        Pvpanic { owner }
    }
}

impl BusDevice for Pvpanic {
    fn name(&self) -> &str {
        "pvpanic"
    }

    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = (PANICKED | CRASH_LOADED) as u8;
    }

    fn write(&self, _: u64, data: &[u8]) {
        let events = value(data);
        for (bit, request) in [(PANICKED, Request::Panicked), (CRASH_LOADED, Request::CrashLoaded)] {
            if events & bit != 0 {
                self.owner.request(self.name(), request);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock::Requests;
    use super::*;

    #[test]
    fn it_says_what_it_takes_and_tells_what_happened() {
        let requests = Requests::new();
        let port = Pvpanic::new(requests.clone());
        let mut data = [0];
        port.read(0, &mut data);
        assert_eq!(data, [3]);
        port.write(0, &[1]);
        assert_eq!(requests.take(), [("pvpanic".to_owned(), Request::Panicked)]);
        port.write(0, &[2]);
        assert_eq!(requests.take(), [("pvpanic".to_owned(), Request::CrashLoaded)]);
        port.write(0, &[0xFC]);
        assert_eq!(requests.take(), [], "nothing that was announced");
    }
}
