//! The state of a machine that is no vCPU's: interrupt controllers, interval timer, clock.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::blob::Blob;
use crate::engine::ioapic::IoApicState;
use crate::engine::{EngineError, Interrupts};

/// What is saved.
#[derive(Deserialize, Serialize)]
pub(super) struct VmState {
    /// The PICs and the IOAPIC, if they are in the kernel.
    chips: Vec<Blob<kvm_irqchip>>,
    pit: Option<Blob<kvm_pit_state2>>,
    /// The IOAPIC, if it is in this process.
    pub(super) ioapic: Option<IoApicState>,
    /// Nanoseconds that the guest's clock (kvmclock) has seen.
    clock: u64,
}

fn system(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> EngineError {
    move |error| EngineError::system(what, error)
}

/// Saves all but an IOAPIC in this process.
pub(super) fn save(fd: &VmFd, interrupts: Interrupts) -> Result<VmState, EngineError> {
    let mut state = VmState {
        chips: Vec::new(),
        pit: None,
        ioapic: None,
        clock: fd.get_clock().map_err(system("KVM_GET_CLOCK"))?.clock,
    };
    if interrupts == Interrupts::Engine {
        for chip_id in 0..=KVM_IRQCHIP_IOAPIC {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            fd.get_irqchip(&mut chip).map_err(system("KVM_GET_IRQCHIP"))?;
            state.chips.push(Blob(chip));
        }
        state.pit = Some(Blob(fd.get_pit2().map_err(system("KVM_GET_PIT2"))?));
    }
    Ok(state)
}

/// Puts it back. The guest's clock goes on from where it was saved.
pub(super) fn restore(fd: &VmFd, state: &VmState) -> Result<(), EngineError> {
    for chip in &state.chips {
        fd.set_irqchip(&chip.0).map_err(system("KVM_SET_IRQCHIP"))?;
    }
    if let Some(pit) = &state.pit {
        fd.set_pit2(&pit.0).map_err(system("KVM_SET_PIT2"))?;
    }
    let clock = kvm_clock_data { clock: state.clock, ..Default::default() };
    fd.set_clock(&clock).map_err(system("KVM_SET_CLOCK"))
}
