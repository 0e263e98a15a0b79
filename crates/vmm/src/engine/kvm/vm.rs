//! A virtual machine of KVM, as its devices see it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use kvm_bindings::{KVMIO, kvm_msi};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::Value;
use viaduct_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use super::attachments::{DoorbellEvent, LineEvent, MsiEvent, Zone, Zones};
use super::coalesced_ring::CoalescedRing;
use super::dirty_ring::DirtyRing;
use super::routes::Routes;
use super::slots::Slots;
use super::vcpu_state::Kept;
use super::vm_state::{self, VmState};
use super::{IOAPIC_PINS, Options};
use crate::bus::BusDevice;
use crate::engine::ioapic::{self, IoApic, Wires};
use crate::engine::{
    Attachment, DirtyPages, Doorbell, EngineError, Interrupts, Msi, MsiRoute, OwnedVm, PostedWrite, Posting, Vm,
};

/// The machine's descriptor and what has been told to it. vCPUs hold it too, so that the guest's memory outlives them.
pub(super) struct KvmVm {
    pub(super) fd: VmFd,
    pub(super) interrupts: Interrupts,
    pub(super) slots: Mutex<Slots>,
    pub(super) routes: Mutex<Routes>,
    pub(super) kept: Kept,
    pub(super) vcpus: usize,
    /// The IOAPIC, if it is in this process.
    pub(super) ioapic: OnceLock<Arc<IoApic>>,
    /// Which writes KVM can post, and where it keeps them.
    pub(super) zones: Zones,
    pub(super) posted: OnceLock<CoalescedRing>,
    /// Entries of each vCPU's dirty ring, and the rings.
    pub(super) dirty_ring: Option<u32>,
    pub(super) rings: Mutex<Vec<DirtyRing>>,
    /// Since one of them has, KVM's place in it is not ours, and entries are where nobody looks.
    pub(super) ring_overflowed: AtomicBool,
}

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xC7);

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

    /// Takes what the vCPUs' rings tell of pages that were written. Returns how much it was.
    pub(super) fn take_rings(&self) -> Result<usize, EngineError> {
        let mut rings = self.rings.lock();
        let mut slots = self.slots.lock();
        let mut entries = 0;
        for ring in &mut *rings {
            let taken = ring.take(|slot, page| slots.note_dirty(slot, page));
            entries += taken.entries;
            if !taken.all {
                self.ring_overflowed.store(true, Ordering::Relaxed);
            }
        }
        if self.ring_overflowed.load(Ordering::Relaxed) {
            slots.note_all_dirty();
        }
        // SAFETY: the machine's own descriptor, and no argument.
        if unsafe { ioctl(&self.fd, KVM_RESET_DIRTY_RINGS()) } < 0 {
            return Err(EngineError::system("KVM_RESET_DIRTY_RINGS", std::io::Error::last_os_error()));
        }
        Ok(entries)
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
        if let Some(ioapic) = self.ioapic.get() {
            ioapic.set_line(gsi, level);
            return Ok(());
        }
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

    fn post_writes(&self, posting: Posting) -> Result<Box<dyn Attachment>, EngineError> {
        Ok(Box::new(Zone::attach(self.clone(), posting)?))
    }
}

/// How an IOAPIC in this process reaches the local APICs. It is held by the machine, so it does not hold it.
pub(super) struct KvmWires(pub(super) Weak<KvmVm>);

impl Wires for KvmWires {
    fn send(&self, msi: Msi) {
        if let Some(vm) = self.0.upgrade() {
            // KVM refuses no message that a redirection entry can hold, except when the machine ends.
            let _ = vm.signal_msi(msi);
        }
    }

    fn route(&self, pin: u32, msi: Option<Msi>) {
        if let Some(vm) = self.0.upgrade() {
            // As above; there is room for all pins from the beginning.
            let _ = vm.set_route(pin, msi);
        }
    }
}

impl OwnedVm for Arc<KvmVm> {
    fn devices(&self) -> Vec<(u64, u64, Arc<dyn BusDevice>)> {
        let ioapic = self.ioapic.get().cloned();
        ioapic.into_iter().map(|device| (ioapic::ADDRESS, ioapic::SIZE, device as Arc<dyn BusDevice>)).collect()
    }

    fn log_dirty_pages(&self, on: bool) -> Result<(), EngineError> {
        self.slots.lock().log_dirty(&self.fd, on)?;
        if self.dirty_ring.is_some() && !on {
            // What is left in the rings is nobody's.
            self.take_rings()?;
        }
        Ok(())
    }

    fn take_dirty_pages(&self) -> Result<Vec<DirtyPages>, EngineError> {
        if self.dirty_ring.is_some() {
            self.take_rings()?;
        }
        self.slots.lock().take_dirty(&self.fd, self.dirty_ring.is_some())
    }

    fn take_posted(&self, deliver: &mut dyn FnMut(&PostedWrite)) {
        if let Some(ring) = self.posted.get() {
            ring.take(deliver);
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        if let Some(ioapic) = self.ioapic.get() {
            ioapic.end_of_interrupt(vector);
        }
    }

    fn save(&self) -> Result<Value, EngineError> {
        let mut state = vm_state::save(&self.fd, self.interrupts)?;
        state.ioapic = self.ioapic.get().map(|ioapic| ioapic.save());
        serde_json::to_value(state).map_err(|error| EngineError::Invalid(format!("saving a machine: {error}")))
    }

    fn restore(&self, state: &Value) -> Result<(), EngineError> {
        let state = VmState::deserialize(state)
            .map_err(|error| EngineError::Invalid(format!("the saved state of a machine: {error}")))?;
        if let (Some(ioapic), Some(state)) = (self.ioapic.get(), &state.ioapic) {
            ioapic.restore(state);
        }
        vm_state::restore(&self.fd, &state)
    }

    fn power_on_state(&self) -> Result<(Value, Vec<Value>), EngineError> {
        // A new machine is the best description of one. It needs no memory of its own to be looked at.
        let memory = self.slots.lock().memory();
        let new = super::create(
            &memory,
            Options { vcpus: self.vcpus, interrupts: self.interrupts, dirty_ring: self.dirty_ring },
        )?;
        let vcpus = new.vcpus.iter().map(|vcpu| vcpu.save()).collect::<Result<_, _>>()?;
        Ok((new.vm.save()?, vcpus))
    }

    fn set_memory(&self, memory: &GuestMemory) -> Result<(), EngineError> {
        self.slots.lock().set(&self.fd, memory)
    }
}
