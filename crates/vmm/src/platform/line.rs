//! An interrupt pin that one device drives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::engine::{EngineError, Vm};

/// A level that reaches the engine only when it changes. Callers hold their device's lock, so changes keep their order.
pub struct Line {
    vm: Arc<dyn Vm>,
    gsi: u32,
    high: AtomicBool,
}

impl Line {
    /// The pin `gsi`, low.
    ///
    /// # Errors
    /// [`EngineError`], if there is no such pin.
    pub fn new(vm: Arc<dyn Vm>, gsi: u32) -> Result<Line, EngineError> {
        vm.set_line(gsi, false)?;
        Ok(Line { vm, gsi, high: AtomicBool::new(false) })
    }

    /// Drives the pin.
    pub fn set(&self, high: bool) {
        if self.high.swap(high, Ordering::Relaxed) != high {
            // The pin was there when this was made; a machine that is being torn down needs no interrupts.
            let _ = self.vm.set_line(self.gsi, high);
        }
    }

    /// Drives the pin whatever it was before: after the interrupt controllers have been reset or restored.
    pub fn repeat(&self, high: bool) {
        self.high.store(high, Ordering::Relaxed);
        let _ = self.vm.set_line(self.gsi, high);
    }
}
