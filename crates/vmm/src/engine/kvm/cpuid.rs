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
//! | 0x15 | the frequency of the time-stamp counter as a ratio to that of the local APIC's timer, which KVM runs at 1 GHz; none where the processor has no such leaf |
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
/// Time-stamp counter and core crystal clock (Intel SDM 2, CPUID leaf 15H).
const TSC_RATIO: u32 = 0x15;
/// What KVM's local APICs count at, and so what stands for the crystal clock: Linux takes that for the APIC's clock.
const APIC_HZ: u32 = 1_000_000_000;
/// The largest numerator: Linux computes kHz of the crystal times the numerator in 32 bits.
const NUMERATOR_MAX: u64 = u32::MAX as u64 / (APIC_HZ as u64 / 1000);

/// The leaves for vCPU `index` of `count`, whose time-stamp counter runs at `tsc_khz`.
pub(super) fn leaves(kvm: &Kvm, index: usize, count: usize, tsc_khz: u32) -> Result<CpuId, EngineError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| EngineError::system("KVM_GET_SUPPORTED_CPUID", error))?;
    let place = Place { id: index as u32, count: count as u32 };
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let intel =
        supported.as_slice().iter().any(|entry| entry.function == 0 && entry.ebx == u32::from_le_bytes(*b"Genu"));
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
            // Other makers have not defined it.
            TSC_RATIO if intel => {
                let (numerator, denominator) = tsc_ratio(tsc_khz);
                let crystal = if numerator != 0 { APIC_HZ } else { 0 };
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (denominator, numerator, crystal, 0);
            }
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

/// The frequency of the time-stamp counter over that of the APIC's timer, as numerator and denominator: the closest one that
/// guests can compute with, by continued fractions. Zeros: it is not known, or none is less than one in a million off, and a guest measures better.
fn tsc_ratio(tsc_khz: u32) -> (u32, u32) {
    let (mut rest, mut divisor) = (u64::from(tsc_khz), u64::from(APIC_HZ / 1000));
    let (mut last, mut ratio) = ((0, 1), (1, 0));
    while divisor != 0 {
        let whole = rest / divisor;
        let next = (whole * ratio.0 + last.0, whole * ratio.1 + last.1);
        if next.0 > NUMERATOR_MAX {
            break;
        }
        (last, ratio) = (ratio, next);
        (rest, divisor) = (divisor, rest % divisor);
    }
    let (numerator, denominator) = ratio;
    let (is, shall) = (numerator * u64::from(APIC_HZ / 1000), u64::from(tsc_khz) * denominator);
    let close = numerator != 0 && denominator != 0 && is.abs_diff(shall) <= shall / 1_000_000;
    if close { (numerator as u32, denominator as u32) } else { (0, 0) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_of_the_time_stamp_counter_is_one_that_guests_can_compute() {
        for khz in [1_000_000, 2_000_000, 2_445_406, 2_593_905, 2_899_999, 3_187_201, 4_294_001, 800_123] {
            let (numerator, denominator) = tsc_ratio(khz);
            // As Linux does (arch/x86/kernel/tsc.c, native_calibrate_tsc): an overflow would be a panic here.
            let computed = f64::from(APIC_HZ / 1000 * numerator) / f64::from(denominator);
            assert!((computed - f64::from(khz)).abs() < f64::from(khz) / 1e6, "{khz}: {numerator}/{denominator}");
        }
        assert_eq!(tsc_ratio(2_000_000), (2, 1));
        assert_eq!(tsc_ratio(2_500_000), (5, 2));
        assert_eq!(tsc_ratio(0), (0, 0), "not known");
        assert_eq!(tsc_ratio(2_000_200), (0, 0), "2/1 is the closest, and a hundred in a million off");
    }
}
