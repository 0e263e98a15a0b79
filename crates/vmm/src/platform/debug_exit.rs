//! A port whose first write ends the machine with the value written: what QEMU calls `isa-debug-exit`, and what small
//! kernels use to say whether their tests passed.

use std::sync::Arc;

use super::{Owner, Request, value};
use crate::bus::BusDevice;

/// The device: four ports, by custom from 0xF4 on.
pub struct DebugExit {
    owner: Arc<dyn Owner>,
}

impl DebugExit {
    /// Asks `owner` to end the machine.
    pub fn new(owner: Arc<dyn Owner>) -> DebugExit {
        DebugExit { owner }
    }
}

impl BusDevice for DebugExit {
    fn name(&self) -> &str {
        "debug-exit"
    }

    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        self.owner.request(self.name(), Request::Exit(value(data)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock::Requests;
    use super::*;

    #[test]
    fn a_write_of_any_width_asks_for_the_end() {
        let requests = Requests::new();
        let port = DebugExit::new(requests.clone());
        port.write(0, &[7]);
        port.write(0, &[0x34, 0x12]);
        port.write(0, &[4, 3, 2, 1]);
        let values: Vec<_> = requests.take().into_iter().map(|(_, request)| request).collect();
        assert_eq!(values, [Request::Exit(7), Request::Exit(0x1234), Request::Exit(0x0102_0304)]);
        let mut data = [9; 4];
        port.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
