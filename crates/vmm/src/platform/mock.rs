//! A virtual machine that only remembers its pins, for the tests of devices.

use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::{Owner, Request};
use crate::engine::{Attachment, Doorbell, EngineError, Msi, MsiRoute, Vm};

/// Remembers every change of a pin.
#[derive(Default)]
pub struct Pins {
    changes: Mutex<Vec<(u32, bool)>>,
}

impl Pins {
    pub fn new() -> Arc<Pins> {
        Arc::default()
    }

    /// The level of a pin.
    pub fn level(&self, gsi: u32) -> bool {
        self.changes.lock().iter().rev().find(|(pin, _)| *pin == gsi).is_some_and(|(_, level)| *level)
    }

    /// How often a pin went from low to high.
    pub fn rises(&self, gsi: u32) -> usize {
        let mut before = false;
        let mut rises = 0;
        for (_, level) in self.changes.lock().iter().filter(|(pin, _)| *pin == gsi) {
            rises += usize::from(*level && !before);
            before = *level;
        }
        rises
    }
}

fn unsupported<T>() -> Result<T, EngineError> {
    Err(EngineError::Unsupported("a machine of pins only".into()))
}

impl Vm for Pins {
    fn set_line(&self, gsi: u32, level: bool) -> Result<(), EngineError> {
        if gsi >= 24 {
            return unsupported();
        }
        self.changes.lock().push((gsi, level));
        Ok(())
    }
    fn signal_msi(&self, _: Msi) -> Result<(), EngineError> {
        unsupported()
    }
    fn attach_line(&self, _: u32, _: &EventFd) -> Result<Box<dyn Attachment>, EngineError> {
        unsupported()
    }
    fn attach_msi(&self, _: &EventFd) -> Result<Box<dyn MsiRoute>, EngineError> {
        unsupported()
    }
    fn attach_doorbell(&self, _: Doorbell, _: &EventFd) -> Result<Box<dyn Attachment>, EngineError> {
        unsupported()
    }
}

/// Remembers what was asked for.
#[derive(Default)]
pub struct Requests(Mutex<Vec<(String, Request)>>);

impl Requests {
    pub fn new() -> Arc<Requests> {
        Arc::default()
    }

    /// What was asked for since the last call.
    pub fn take(&self) -> Vec<(String, Request)> {
        std::mem::take(&mut self.0.lock())
    }
}

impl Owner for Requests {
    fn request(&self, device: &str, request: Request) {
        self.0.lock().push((device.to_owned(), request));
    }
}
