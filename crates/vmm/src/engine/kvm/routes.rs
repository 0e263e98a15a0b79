//! The interrupt routing table: what a signal of each interrupt number (GSI) is.
//!
//! # Theory of operation
//!
//! KVM takes the table as a whole and swaps it, so all users of a machine share one here. Numbers below
//! [`IOAPIC_PINS`] are pins: with all controllers in the kernel they are wired as a PC's are, to the IOAPIC and, below 16, to
//! the PICs; with the IOAPIC in this process each is the message that the IOAPIC's redirection entry says. Numbers from
//! there on are handed out to devices for their messages (MSI, MSI-X). A number whose message is not set has no route: a
//! signal of it is kept nowhere by KVM, so an irqfd is attached to a number only while that has a message.

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER as KVM_IRQCHIP_PIC_FIRST,
    KVM_IRQCHIP_PIC_SLAVE as KVM_IRQCHIP_PIC_SECOND, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;

use super::IOAPIC_PINS;
use crate::engine::{EngineError, Interrupts, Msi};

/// Routes that KVM takes at most (KVM_MAX_IRQ_ROUTES).
const ROUTES_MAX: usize = 4096;
/// Pins of the two PICs together.
const PIC_PINS: u32 = 16;

/// The table.
pub(super) struct Routes {
    interrupts: Interrupts,
    messages: BTreeMap<u32, Option<Msi>>,
}

impl Routes {
    pub(super) fn new(interrupts: Interrupts) -> Routes {
        Routes { interrupts, messages: BTreeMap::new() }
    }

    /// Takes a free number for a device's messages.
    pub(super) fn take(&mut self) -> Result<u32, EngineError> {
        let wired = 2 * IOAPIC_PINS as usize;
        let free = (IOAPIC_PINS..).find(|gsi| !self.messages.contains_key(gsi));
        let gsi = free.filter(|_| self.messages.len() + wired < ROUTES_MAX).ok_or_else(|| {
            EngineError::Unsupported(format!("all of KVM's {ROUTES_MAX} interrupt routes are taken by devices"))
        })?;
        self.messages.insert(gsi, None);
        Ok(gsi)
    }

    /// Gives a number back.
    pub(super) fn give_back(&mut self, gsi: u32) {
        self.messages.remove(&gsi);
    }

    /// What a signal of `gsi` sends. Returns what it sent before.
    pub(super) fn set(&mut self, gsi: u32, message: Option<Msi>) -> Option<Msi> {
        self.messages.insert(gsi, message).flatten()
    }

    /// Makes this table KVM's.
    pub(super) fn apply(&self, fd: &VmFd) -> Result<(), EngineError> {
        let entries = self.entries();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| EngineError::Unsupported(format!("a table of {} routes: {error:?}", entries.len())))?;
        fd.set_gsi_routing(&table)
            .map_err(|error| EngineError::system(format!("KVM_SET_GSI_ROUTING of {} routes", entries.len()), error))
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let mut entries = Vec::new();
        if self.interrupts == Interrupts::Engine {
            for gsi in 0..PIC_PINS {
                let (chip, pin) =
                    if gsi < 8 { (KVM_IRQCHIP_PIC_FIRST, gsi) } else { (KVM_IRQCHIP_PIC_SECOND, gsi - 8) };
                entries.push(pin_entry(gsi, chip, pin));
            }
            // The interval timer's interrupt 0 is pin 2 of a PC's IOAPIC, where the PICs' output of old was not used.
            entries.push(pin_entry(0, KVM_IRQCHIP_IOAPIC, 2));
            entries.extend(
                (0..IOAPIC_PINS).filter(|gsi| ![0, 2].contains(gsi)).map(|gsi| pin_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
            );
        }
        entries
            .extend(self.messages.iter().filter_map(|(gsi, message)| message.map(|message| msi_entry(*gsi, message))));
        entries
    }
}

fn pin_entry(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_entry(gsi: u32, message: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}
