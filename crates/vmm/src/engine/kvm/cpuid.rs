//! What a guest finds in CPUID: everything that KVM says it can give, made true for the one processor that asks.
//!
//! # The policy
//!
//! | leaf | what |
//! |---|---|
//! | all | as `KVM_GET_SUPPORTED_CPUID` says: the host's features that KVM can give, KVM's signature and features at 0x4000_0000 |
//! | 0x1, 0xB, 0x1F, 0x8000_001E | the vCPU's APIC id, and a topology of one package with one core for each vCPU |
//! | 0x1 | "hypervisor present" and, where KVM has it, the local APIC's TSC deadline timer |
//! | 0x1, 0x8000_0001 | no VT-x and no SVM: the state of a guest's own guests is not saved |
//! | 0x4, 0x8000_0008 | how many cores share a package |
//! | 0x4000_0010 | the frequency of the time-stamp counter in kHz, so that a guest need not measure it against a timer |
//!
//! Intel SDM 2, CPUID; AMD APM 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::engine::EngineError;

const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_VMX: u32 = 1 << 5;
/// In leaf 0x8000_0001.
const FEATURE_SVM: u32 = 1 << 2;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
const FEATURE_HYPERTHREADING: u32 = 1 << 28;
const KVM_SIGNATURE: u32 = 0x4000_0000;
/// Where hypervisors tell frequencies, a convention that VMware began and Linux's guests of any hypervisor may read.
const FREQUENCIES: u32 = 0x4000_0010;

/// The leaves for vCPU `index` of `count`, whose time-stamp counter runs at `tsc_khz`.
pub(super) fn leaves(kvm: &Kvm, index: usize, count: usize, tsc_khz: u32) -> Result<CpuId, EngineError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| EngineError::system("KVM_GET_SUPPORTED_CPUID", error))?;
    let place = Place { id: index as u32, count: count as u32 };
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|entry| entry.function != FREQUENCIES).copied().collect();
    for entry in &mut entries {
        place.apply(entry);
        match entry.function {
            0x1 => {
                entry.ecx = entry.ecx & !FEATURE_VMX | FEATURE_HYPERVISOR;
                if deadline {
                    entry.ecx |= FEATURE_TSC_DEADLINE;
                }
            }
            0x8000_0001 => entry.ecx &= !FEATURE_SVM,
            KVM_SIGNATURE => entry.eax = entry.eax.max(FREQUENCIES),
            _ => {}
        }
    }
    if tsc_khz != 0 {
        entries.push(kvm_cpuid_entry2 { function: FREQUENCIES, eax: tsc_khz, ..Default::default() });
    }
    place.add_topology(&mut entries);
    CpuId::from_entries(&entries)
        .map_err(|error| EngineError::Unsupported(format!("{} leaves of CPUID: {error:?}", entries.len())))
}

/// One core of a package.
struct Place {
    id: u32,
    count: u32,
}

impl Place {
    /// Bits of an APIC id that tell the cores of a package apart.
    fn bits(&self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    fn apply(&self, entry: &mut kvm_cpuid_entry2) {
        match entry.function {
            0x1 => {
                let logical = self.count.next_power_of_two().min(255);
                entry.ebx = entry.ebx & 0xFFFF | logical << 16 | self.id << 24;
                entry.edx =
                    entry.edx & !FEATURE_HYPERTHREADING | if self.count > 1 { FEATURE_HYPERTHREADING } else { 0 };
            }
            // Caches of Intel: one core's are its own; 0 in bits 14 to 25 means that nobody shares it.
            0x4 if entry.eax & 0x1F != 0 => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 { self.count.next_power_of_two() - 1 } else { 0 };
                let cores = (self.count.next_power_of_two() - 1).min(63);
                entry.eax = entry.eax & 0x3FFF | sharing << 14 | cores << 26;
            }
            // Caches of AMD.
            0x8000_001D if entry.eax & 0x1F != 0 => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 { self.count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3FFF | sharing << 14;
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xF0FF | self.bits() << 12 | (self.count - 1),
            0x8000_001E => {
                entry.eax = self.id;
                entry.ebx = self.id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    /// Replaces the leaves that spell out the topology, level by level: threads of a core, cores of a package.
    fn add_topology(&self, entries: &mut Vec<kvm_cpuid_entry2>) {
        const THREADS: u32 = 1;
        const CORES: u32 = 2;
        for function in [0xB, 0x1F] {
            if !entries.iter().any(|entry| entry.function == function) {
                continue;
            }
            entries.retain(|entry| entry.function != function);
            let level = |index, kind: u32, shift, processors| kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: processors,
                ecx: index | kind << 8,
                edx: self.id,
                ..Default::default()
            };
            entries.extend([level(0, THREADS, 0, 1), level(1, CORES, self.bits(), self.count), level(2, 0, 0, 0)]);
        }
    }
}
