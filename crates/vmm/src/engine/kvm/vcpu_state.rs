//! All of a vCPU's state, saved and put back: for snapshots, and for a reset, which puts back what a new vCPU has.
//!
//! # Theory of operation
//!
//! KVM gives a vCPU's state in pieces, and the order in which they are put back matters: the local APIC's address and mode
//! are in the special registers, so those come before the APIC's own; the model-specific registers come after it, because
//! the TSC deadline is dropped by an APIC whose timer is not in that mode; pending events are last, so that nothing before
//! them delivers or clears one.
//!
//! Model-specific registers: those that this KVM says it keeps ("policy" is KVM's, which answers the guest's accesses
//! itself: what it does not know is a general protection fault). A register that KVM lists and then refuses to give, as
//! those of Hyper-V's that are not switched on, is left out.

use kvm_bindings::{
    CpuId, KVM_CAP_SET_GUEST_DEBUG2, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::blob::Blob;
use crate::engine::EngineError;

/// Registers that one KVM_GET_MSRS may be asked for (KVM's MAX_IO_MSRS).
const MSRS_AT_ONCE: usize = 256;

/// What is saved.
#[derive(Deserialize, Serialize)]
pub(super) struct VcpuState {
    cpuid: Vec<Blob<kvm_cpuid_entry2>>,
    tsc_khz: u32,
    mp_state: u32,
    regs: Blob<kvm_regs>,
    sregs: Blob<kvm_sregs>,
    xsave: Blob<kvm_xsave>,
    xcrs: Blob<kvm_xcrs>,
    debugregs: Blob<kvm_debugregs>,
    /// `None`: the machine has no interrupt controllers.
    lapic: Option<Blob<kvm_lapic_state>>,
    /// (index, value)
    msrs: Vec<(u32, u64)>,
    events: Blob<kvm_vcpu_events>,
}

/// What KVM on this host keeps for a vCPU; the same for all of them.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    msrs: Vec<u32>,
    lapic: bool,
    xsave_size: i32,
    pub(super) hardware_breakpoints: usize,
    /// Flags of KVM_SET_GUEST_DEBUG that came later.
    pub(super) debug_flags: u32,
}

impl Kept {
    pub(super) fn new(kvm: &Kvm, lapic: bool) -> Result<Kept, EngineError> {
        let list = kvm.get_msr_index_list().map_err(|error| EngineError::system("KVM_GET_MSR_INDEX_LIST", error))?;
        let xsave_size = kvm.check_extension_int(Cap::Xsave2);
        Ok(Kept {
            msrs: list.as_slice().to_vec(),
            lapic,
            xsave_size,
            hardware_breakpoints: if kvm.check_extension(Cap::SetGuestDebug) { 4 } else { 0 },
            debug_flags: u32::try_from(kvm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into())).unwrap_or(0),
        })
    }
}

fn system(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> EngineError {
    move |error| EngineError::system(what, error)
}

/// Saves a vCPU that does not run, and has no access to complete.
pub(super) fn save(fd: &VcpuFd, kept: &Kept) -> Result<VcpuState, EngineError> {
    if kept.xsave_size > size_of::<kvm_xsave>() as i32 {
        // Only where this process has asked Linux for AMX, which it does not.
        let size = kept.xsave_size;
        return Err(EngineError::Unsupported(format!("a vCPU's extended state has {size} bytes: 4096 can be saved")));
    }
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(system("KVM_GET_CPUID2"))?;
    Ok(VcpuState {
        cpuid: cpuid.as_slice().iter().copied().map(Blob).collect(),
        tsc_khz: fd.get_tsc_khz().map_err(system("KVM_GET_TSC_KHZ"))?,
        // First of the rest: KVM takes a start-up message that the vCPU has received into account when it is asked for this.
        mp_state: fd.get_mp_state().map_err(system("KVM_GET_MP_STATE"))?.mp_state,
        regs: Blob(fd.get_regs().map_err(system("KVM_GET_REGS"))?),
        sregs: Blob(fd.get_sregs().map_err(system("KVM_GET_SREGS"))?),
        xsave: Blob(fd.get_xsave().map_err(system("KVM_GET_XSAVE"))?),
        xcrs: Blob(fd.get_xcrs().map_err(system("KVM_GET_XCRS"))?),
        debugregs: Blob(fd.get_debug_regs().map_err(system("KVM_GET_DEBUGREGS"))?),
        lapic: if kept.lapic { Some(Blob(fd.get_lapic().map_err(system("KVM_GET_LAPIC"))?)) } else { None },
        msrs: save_msrs(fd, &kept.msrs)?,
        events: Blob(fd.get_vcpu_events().map_err(system("KVM_GET_VCPU_EVENTS"))?),
    })
}

fn save_msrs(fd: &VcpuFd, mut indexes: &[u32]) -> Result<Vec<(u32, u64)>, EngineError> {
    let mut values = Vec::with_capacity(indexes.len());
    while !indexes.is_empty() {
        let now = &indexes[..indexes.len().min(MSRS_AT_ONCE)];
        let entries: Vec<_> = now.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = table(&entries)?;
        // It stops at the first one that it refuses.
        let given = fd.get_msrs(&mut msrs).map_err(system("KVM_GET_MSRS"))?.min(now.len());
        values.extend(msrs.as_slice()[..given].iter().map(|entry| (entry.index, entry.data)));
        indexes = &indexes[given + usize::from(given < now.len())..];
    }
    Ok(values)
}

fn table(entries: &[kvm_msr_entry]) -> Result<Msrs, EngineError> {
    Msrs::from_entries(entries).map_err(|error| EngineError::Unsupported(format!("a table of registers: {error:?}")))
}

/// Puts a state back that a vCPU of the same machine, or of one made alike, was saved in.
pub(super) fn restore(fd: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    restore_cpuid(fd, state)?;
    fd.set_mp_state(kvm_mp_state { mp_state: state.mp_state }).map_err(system("KVM_SET_MP_STATE"))?;
    fd.set_regs(&state.regs.0).map_err(system("KVM_SET_REGS"))?;
    fd.set_sregs(&state.sregs.0).map_err(system("KVM_SET_SREGS"))?;
    // SAFETY: no dynamically enabled feature makes it larger than this structure, which `save` has seen to.
    unsafe { fd.set_xsave(&state.xsave.0) }.map_err(system("KVM_SET_XSAVE"))?;
    fd.set_xcrs(&state.xcrs.0).map_err(system("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&state.debugregs.0).map_err(system("KVM_SET_DEBUGREGS"))?;
    if let Some(lapic) = &state.lapic {
        fd.set_lapic(&lapic.0).map_err(system("KVM_SET_LAPIC"))?;
    }
    restore_msrs(fd, &state.msrs)?;
    fd.set_vcpu_events(&state.events.0).map_err(system("KVM_SET_VCPU_EVENTS"))
}

/// KVM lets CPUID be changed only before the vCPU's first run, so it is left alone where it is the same.
fn restore_cpuid(fd: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    let wanted: Vec<_> = state.cpuid.iter().map(|entry| entry.0).collect();
    let current = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(system("KVM_GET_CPUID2"))?;
    if current.as_slice() != wanted {
        let table = CpuId::from_entries(&wanted)
            .map_err(|error| EngineError::Invalid(format!("{} leaves of CPUID: {error:?}", wanted.len())))?;
        fd.set_cpuid2(&table).map_err(|error| {
            EngineError::system("KVM_SET_CPUID2: this host's processor cannot be like the saved vCPU's", error)
        })?;
    }
    // 0: that KVM did not know. Where frequencies differ, KVM must scale, or say that it cannot.
    if state.tsc_khz != 0 && fd.get_tsc_khz().map_err(system("KVM_GET_TSC_KHZ"))? != state.tsc_khz {
        let khz = state.tsc_khz;
        fd.set_tsc_khz(khz).map_err(|error| {
            EngineError::system(
                format!("KVM_SET_TSC_KHZ: this host cannot run a time-stamp counter at {khz} kHz"),
                error,
            )
        })?;
    }
    Ok(())
}

fn restore_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), EngineError> {
    let entries: Vec<_> =
        values.iter().map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() }).collect();
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let taken = fd.set_msrs(&table(now)?).map_err(system("KVM_SET_MSRS"))?;
        if taken < now.len() {
            // A register that can be read and not written keeps its value: it is one that the host decides.
            let refused = now[taken];
            let current = save_msrs(fd, &[refused.index])?;
            if current != [(refused.index, refused.data)] {
                let (index, data) = (refused.index, refused.data);
                return Err(EngineError::Unsupported(format!(
                    "this host's KVM does not let register {index:#x} be {data:#x}; it has {current:x?}"
                )));
            }
        }
        rest = &rest[(taken + 1).min(now.len())..];
    }
    Ok(())
}
