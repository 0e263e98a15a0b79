//! A virtual machine that takes every interrupt and every doorbell, or refuses them.

use viaduct_vmm::engine::{Attachment, Doorbell, EngineError, Msi, MsiRoute, Vm};
use vmm_sys_util::eventfd::EventFd;

/// `refuses`: has neither doorbells nor routes for messages.
pub struct QuietVm {
    pub refuses: bool,
}

struct Attached;

impl Attachment for Attached {}

impl MsiRoute for Attached {
    fn set(&self, _: Option<Msi>) -> Result<(), EngineError> {
        Ok(())
    }
}

impl QuietVm {
    fn attach(&self) -> Result<Box<Attached>, EngineError> {
        if self.refuses { Err(EngineError::Unsupported(String::new())) } else { Ok(Box::new(Attached)) }
    }
}

impl Vm for QuietVm {
    fn set_line(&self, _: u32, _: bool) -> Result<(), EngineError> {
        Ok(())
    }

    fn signal_msi(&self, _: Msi) -> Result<(), EngineError> {
        Ok(())
    }

    fn attach_line(&self, _: u32, _: &EventFd) -> Result<Box<dyn Attachment>, EngineError> {
        Ok(Box::new(Attached))
    }

    fn attach_msi(&self, _: &EventFd) -> Result<Box<dyn MsiRoute>, EngineError> {
        Ok(self.attach()?)
    }

    fn attach_doorbell(&self, _: Doorbell, _: &EventFd) -> Result<Box<dyn Attachment>, EngineError> {
        Ok(self.attach()?)
    }
}
