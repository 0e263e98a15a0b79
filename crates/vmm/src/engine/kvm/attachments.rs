//! Eventfds that KVM signals itself (ioeventfd) and listens to (irqfd), and zones where it posts writes, for as long as
//! somebody holds what is returned here.

use std::sync::Arc;

use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::vm::KvmVm;
use crate::engine::{Attachment, Doorbell, EngineError, Msi, MsiRoute, Posting, Space};

/// An ioeventfd.
pub(super) struct DoorbellEvent {
    vm: Arc<KvmVm>,
    doorbell: Doorbell,
    event: EventFd,
}

impl DoorbellEvent {
    pub(super) fn attach(vm: Arc<KvmVm>, doorbell: Doorbell, event: &EventFd) -> Result<DoorbellEvent, EngineError> {
        let event =
            event.try_clone().map_err(|error| EngineError::system("duplicating a doorbell's eventfd", error))?;
        let result = match doorbell {
            Doorbell::Port { port, value: None } => vm.fd.register_ioevent(&event, &pio(port), NoDatamatch),
            Doorbell::Port { port, value: Some(value) } => vm.fd.register_ioevent(&event, &pio(port), Word(value)),
            Doorbell::Address { address, value: None } => {
                vm.fd.register_ioevent(&event, &IoEventAddress::Mmio(address), NoDatamatch)
            }
            Doorbell::Address { address, value: Some(value) } => {
                vm.fd.register_ioevent(&event, &IoEventAddress::Mmio(address), value)
            }
        };
        result.map_err(|error| EngineError::system(format!("KVM_IOEVENTFD of {doorbell:x?}"), error))?;
        Ok(DoorbellEvent { vm, doorbell, event })
    }
}

/// A 16-bit value to compare with; its size is what KVM compares.
struct Word(u16);

impl From<Word> for u64 {
    fn from(word: Word) -> u64 {
        word.0.into()
    }
}

fn pio(port: u16) -> IoEventAddress {
    IoEventAddress::Pio(port.into())
}

impl Attachment for DoorbellEvent {}

impl Drop for DoorbellEvent {
    fn drop(&mut self) {
        let (fd, event) = (&self.vm.fd, &self.event);
        // It was attached with the same values, so there is nothing that could be refused.
        let _ = match self.doorbell {
            Doorbell::Port { port, value: None } => fd.unregister_ioevent(event, &pio(port), NoDatamatch),
            Doorbell::Port { port, value: Some(value) } => fd.unregister_ioevent(event, &pio(port), Word(value)),
            Doorbell::Address { address, value: None } => {
                fd.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            }
            Doorbell::Address { address, value: Some(value) } => {
                fd.unregister_ioevent(event, &IoEventAddress::Mmio(address), value)
            }
        };
    }
}

/// Which writes this KVM can post.
#[derive(Clone, Copy, Debug)]
pub(super) struct Zones {
    ports: bool,
    pub(super) addresses: bool,
}

impl Zones {
    pub(super) fn of(kvm: &Kvm) -> Zones {
        let addresses = kvm.check_extension(Cap::CoalescedMmio);
        Zones { ports: addresses && kvm.check_extension(Cap::CoalescedPio), addresses }
    }
}

/// Where KVM posts writes.
pub(super) struct Zone {
    vm: Arc<KvmVm>,
    posting: Posting,
}

impl Zone {
    pub(super) fn attach(vm: Arc<KvmVm>, posting: Posting) -> Result<Zone, EngineError> {
        let (can, what) = match posting.space {
            Space::Ports => (vm.zones.ports, "KVM_CAP_COALESCED_PIO"),
            Space::Addresses => (vm.zones.addresses, "KVM_CAP_COALESCED_MMIO"),
        };
        if !can || vm.posted.get().is_none() {
            return Err(EngineError::Unsupported(format!("posted writes need {what}, which this KVM does not have")));
        }
        let zone = Zone { vm, posting };
        let (address, size) = zone.place();
        zone.vm.fd.register_coalesced_mmio(address, size).map_err(|error| {
            EngineError::system(format!("KVM_REGISTER_COALESCED_MMIO of {:x?}", zone.posting), error)
        })?;
        Ok(zone)
    }

    fn place(&self) -> (IoEventAddress, u32) {
        let Posting { space, range } = self.posting;
        // Registers of a device: never four gigabytes of them.
        let size = (range.last - range.base + 1) as u32;
        match space {
            Space::Ports => (IoEventAddress::Pio(range.base), size),
            Space::Addresses => (IoEventAddress::Mmio(range.base), size),
        }
    }
}

impl Attachment for Zone {}

impl Drop for Zone {
    fn drop(&mut self) {
        let (address, size) = self.place();
        // As for a doorbell.
        let _ = self.vm.fd.unregister_coalesced_mmio(address, size);
    }
}

/// An irqfd of a pin.
pub(super) struct LineEvent {
    vm: Arc<KvmVm>,
    gsi: u32,
    event: EventFd,
}

impl LineEvent {
    pub(super) fn attach(vm: Arc<KvmVm>, gsi: u32, event: &EventFd) -> Result<LineEvent, EngineError> {
        let event =
            event.try_clone().map_err(|error| EngineError::system("duplicating an interrupt's eventfd", error))?;
        vm.fd
            .register_irqfd(&event, gsi)
            .map_err(|error| EngineError::system(format!("KVM_IRQFD of interrupt {gsi}"), error))?;
        Ok(LineEvent { vm, gsi, event })
    }
}

impl Attachment for LineEvent {}

impl Drop for LineEvent {
    fn drop(&mut self) {
        // As for a doorbell.
        let _ = self.vm.fd.unregister_irqfd(&self.event, self.gsi);
    }
}

/// An irqfd of a message. While there is no message it is not attached, and what is signalled stays in the event.
pub(super) struct MsiEvent {
    vm: Arc<KvmVm>,
    gsi: u32,
    event: EventFd,
    attached: Mutex<bool>,
}

impl MsiEvent {
    pub(super) fn attach(vm: Arc<KvmVm>, event: &EventFd) -> Result<MsiEvent, EngineError> {
        let event = event.try_clone().map_err(|error| EngineError::system("duplicating a message's eventfd", error))?;
        let gsi = vm.routes.lock().take()?;
        Ok(MsiEvent { vm, gsi, event, attached: Mutex::new(false) })
    }
}

impl MsiRoute for MsiEvent {
    fn set(&self, msi: Option<Msi>) -> Result<(), EngineError> {
        let mut attached = self.attached.lock();
        let system = |error| EngineError::system(format!("KVM_IRQFD of message {}", self.gsi), error);
        if msi.is_none() && *attached {
            self.vm.fd.unregister_irqfd(&self.event, self.gsi).map_err(system)?;
            *attached = false;
        }
        self.vm.set_route(self.gsi, msi)?;
        if msi.is_some() && !*attached {
            // KVM looks at the event when it is attached: what was signalled meanwhile is sent now.
            self.vm.fd.register_irqfd(&self.event, self.gsi).map_err(system)?;
            *attached = true;
        }
        Ok(())
    }
}

impl Drop for MsiEvent {
    fn drop(&mut self) {
        if *self.attached.lock() {
            // As for a doorbell.
            let _ = self.vm.fd.unregister_irqfd(&self.event, self.gsi);
        }
        // A table with one route less is never refused.
        let _ = self.vm.update_routes(|routes| {
            routes.give_back(self.gsi);
            Ok(())
        });
    }
}
