//! A virtual machine of KVM, as its devices see it.

use std::sync::Arc;

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use viaduct_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::IOAPIC_PINS;
use super::attachments::{DoorbellEvent, LineEvent, MsiEvent};
use super::routes::Routes;
use super::slots::Slots;
use crate::engine::{Attachment, Doorbell, EngineError, Interrupts, Msi, MsiRoute, OwnedVm, Vm};

/// The machine's descriptor and what has been told to it. vCPUs hold it too, so that the guest's memory outlives them.
pub(super) struct KvmVm {
    pub(super) fd: VmFd,
    pub(super) interrupts: Interrupts,
    pub(super) slots: Mutex<Slots>,
    pub(super) routes: Mutex<Routes>,
}

impl KvmVm {
    /// Changes the routing table and gives it to KVM.
    pub(super) fn update_routes(
        &self,
        change: impl FnOnce(&mut Routes) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let mut routes = self.routes.lock();
        change(&mut routes)?;
        if self.interrupts == Interrupts::None { Ok(()) } else { routes.apply(&self.fd) }
    }

    /// Changes what a signal of `gsi` sends; if KVM refuses, nothing.
    pub(super) fn set_route(&self, gsi: u32, message: Option<Msi>) -> Result<(), EngineError> {
        let mut routes = self.routes.lock();
        let before = routes.set(gsi, message);
        if before == message {
            return Ok(());
        }
        routes.apply(&self.fd).inspect_err(|_| {
            routes.set(gsi, before);
        })
    }

    fn check_interrupts(&self, what: &str) -> Result<(), EngineError> {
        if self.interrupts == Interrupts::None {
            return Err(EngineError::Unsupported(format!(
                "{what}: the machine was made without interrupt controllers"
            )));
        }
        Ok(())
    }

    fn check_pin(&self, gsi: u32) -> Result<(), EngineError> {
        self.check_interrupts(&format!("interrupt {gsi}"))?;
        if gsi >= IOAPIC_PINS {
            let last = IOAPIC_PINS - 1;
            return Err(EngineError::Invalid(format!("interrupt {gsi}: the pins of the IOAPIC are 0 to {last}")));
        }
        Ok(())
    }
}

impl Vm for Arc<KvmVm> {
    fn set_line(&self, gsi: u32, level: bool) -> Result<(), EngineError> {
        self.check_pin(gsi)?;
        self.fd
            .set_irq_line(gsi, level)
            .map_err(|error| EngineError::system(format!("KVM_IRQ_LINE of interrupt {gsi}"), error))
    }

    fn signal_msi(&self, msi: Msi) -> Result<(), EngineError> {
        self.check_interrupts("a message-signalled interrupt")?;
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0: no local APIC took it, which is the guest's affair.
        self.fd
            .signal_msi(message)
            .map_err(|error| EngineError::system(format!("KVM_SIGNAL_MSI of {msi:x?}"), error))?;
        Ok(())
    }

    fn attach_line(&self, gsi: u32, event: &EventFd) -> Result<Box<dyn Attachment>, EngineError> {
        self.check_pin(gsi)?;
        Ok(Box::new(LineEvent::attach(self.clone(), gsi, event)?))
    }

    fn attach_msi(&self, event: &EventFd) -> Result<Box<dyn MsiRoute>, EngineError> {
        self.check_interrupts("a message-signalled interrupt")?;
        Ok(Box::new(MsiEvent::attach(self.clone(), event)?))
    }

    fn attach_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<Box<dyn Attachment>, EngineError> {
        Ok(Box::new(DoorbellEvent::attach(self.clone(), doorbell, event)?))
    }
}

impl OwnedVm for Arc<KvmVm> {
    fn set_memory(&self, memory: &GuestMemory) -> Result<(), EngineError> {
        self.slots.lock().set(&self.fd, memory)
    }
}
