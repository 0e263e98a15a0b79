//! KVM: the host's processor executes the guest's instructions.
//!
//! # Theory of operation
//!
//! KVM is three kinds of descriptors. `/dev/kvm` says what it can do and makes virtual machines; a machine's descriptor
//! takes memory slots ([`slots`]), interrupts ([`routes`]) and events ([`attachments`]), and makes vCPUs; a vCPU's runs the
//! guest on the thread that asks ([`vcpu`]). What a guest finds in CPUID is decided in [`cpuid`].
//!
//! Every host's KVM is a different one: it may have been compiled without something, be of another age, or itself run
//! inside a virtual machine. What a machine cannot do without is checked here when the machine is made, and refused by
//! name; nothing is left out silently.

mod attachments;
mod blob;
mod coalesced_ring;
mod cpuid;
mod dirty_ring;
mod routes;
mod run_page;
mod slots;
mod vcpu;
mod vcpu_state;
mod vm;
mod vm_state;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VmFd};
use parking_lot::Mutex;
use viaduct_memory::GuestMemory;

use super::ioapic::{self, IoApic};
use super::{EngineError, Interrupts, OwnedVm, Parts, Vcpu};
use attachments::Zones;
use dirty_ring::DirtyRing;
use routes::Routes;
use slots::Slots;
use vcpu_state::Kept;
use vm::{KvmVm, KvmWires};

/// The device that KVM is reached by.
pub const DEVICE: &str = "/dev/kvm";
/// Pins of an IOAPIC (82093AA), which are also the interrupt numbers that have one.
const IOAPIC_PINS: u32 = ioapic::PINS as u32;
/// vCPUs that a machine may have: more than the guests of this field use, and each is a thread here.
pub const VCPUS_MAX: usize = 64;
/// Where Intel's processors without "unrestricted guest" keep a task state segment for real mode, and the identity page
/// table that they need there: behind all devices, below the BIOS.
const TSS: u64 = 0xFFFB_D000;
const IDENTITY_MAP: u64 = 0xFFFB_C000;

/// What a machine is made with, besides its memory.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Its processors.
    pub vcpus: usize,
    /// Where its interrupt controllers are.
    pub interrupts: Interrupts,
    /// Entries of the ring in which each vCPU notes the pages it writes, a power of two; `None`: a bitmap for each region.
    pub dirty_ring: Option<u32>,
}

/// What is needed of KVM whatever the machine is like.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// What interrupt controllers need.
const NEEDED_BY_INTERRUPTS: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
];

/// Opens KVM and sees that it is the one we know.
fn open() -> Result<Kvm, EngineError> {
    let kvm = Kvm::new().map_err(|error| EngineError::system(format!("opening {DEVICE}"), error))?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(EngineError::Unsupported(format!(
            "{DEVICE} speaks version {version} of its interface; every Linux since 2.6.22 speaks {KVM_API_VERSION}"
        )));
    }
    Ok(kvm)
}

fn check(kvm: &Kvm, needed: &[(Cap, &str)], what: &str) -> Result<(), EngineError> {
    let missing: Vec<_> = needed.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(EngineError::Unsupported(format!("{what} needs {}, which this host's KVM does not have", missing.join(", "))))
}

/// Makes a machine.
///
/// # Errors
/// [`EngineError`]: what this host's KVM cannot do, or what the options ask too much of.
pub fn create(memory: &GuestMemory, options: Options) -> Result<Parts, EngineError> {
    let Options { vcpus, interrupts, dirty_ring } = options;
    let kvm = open()?;
    check(&kvm, NEEDED, "a virtual machine")?;
    let allowed = VCPUS_MAX.min(kvm.get_max_vcpus());
    if vcpus == 0 || vcpus > allowed {
        return Err(EngineError::Invalid(format!(
            "{vcpus} vCPUs: allowed are 1 to {allowed} (Viaduct's limit is {VCPUS_MAX}, this KVM's {})",
            kvm.get_max_vcpus()
        )));
    }
    let fd = kvm.create_vm().map_err(|error| EngineError::system("KVM_CREATE_VM", error))?;
    fd.set_identity_map_address(IDENTITY_MAP)
        .map_err(|error| EngineError::system("KVM_SET_IDENTITY_MAP_ADDR", error))?;
    fd.set_tss_address(TSS as usize).map_err(|error| EngineError::system("KVM_SET_TSS_ADDR", error))?;
    create_interrupts(&kvm, &fd, interrupts)?;
    if let Some(entries) = dirty_ring {
        enable_dirty_rings(&kvm, &fd, entries)?;
    }
    let slots = Slots::new(kvm.get_nr_memslots());
    let vm = Arc::new(KvmVm {
        fd,
        interrupts,
        slots: Mutex::new(slots),
        routes: Mutex::new(Routes::new(interrupts)),
        kept: Kept::new(&kvm, interrupts != Interrupts::None)?,
        vcpus,
        ioapic: OnceLock::new(),
        zones: Zones::of(&kvm),
        posted: OnceLock::new(),
        dirty_ring,
        rings: Mutex::default(),
        ring_overflowed: AtomicBool::new(false),
    });
    if interrupts == Interrupts::Split {
        let wires = Arc::new(KvmWires(Arc::downgrade(&vm)));
        vm.ioapic.get_or_init(|| Arc::new(IoApic::new(wires)));
    }
    vm.set_memory(memory)?;
    vm.update_routes(|_| Ok(()))?;
    let vcpus = (0..vcpus)
        .map(|index| vcpu::KvmVcpu::new(&kvm, vm.clone(), index, vcpus).map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>))
        .collect::<Result<_, _>>()?;
    Ok(Parts { vm: Arc::new(vm), vcpus })
}

fn create_interrupts(kvm: &Kvm, fd: &VmFd, interrupts: Interrupts) -> Result<(), EngineError> {
    match interrupts {
        Interrupts::None => Ok(()),
        Interrupts::Engine => {
            check(kvm, NEEDED_BY_INTERRUPTS, "an interrupt controller")?;
            check(kvm, &[(Cap::Pit2, "KVM_CAP_PIT2")], "an interval timer")?;
            fd.create_irq_chip().map_err(|error| EngineError::system("KVM_CREATE_IRQCHIP", error))?;
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(config).map_err(|error| EngineError::system("KVM_CREATE_PIT2", error))
        }
        Interrupts::Split => {
            check(kvm, NEEDED_BY_INTERRUPTS, "an interrupt controller")?;
            check(kvm, &[(Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP")], "a split interrupt controller")?;
            let mut cap = kvm_enable_cap { cap: Cap::SplitIrqchip as u32, ..Default::default() };
            cap.args[0] = u64::from(IOAPIC_PINS);
            fd.enable_cap(&cap).map_err(|error| EngineError::system("KVM_CAP_SPLIT_IRQCHIP", error))
        }
    }
}

fn enable_dirty_rings(kvm: &Kvm, fd: &VmFd, entries: u32) -> Result<(), EngineError> {
    let cap = u64::from(KVM_CAP_DIRTY_LOG_RING);
    let bytes = DirtyRing::bytes(entries);
    let max = usize::try_from(kvm.check_extension_raw(cap)).unwrap_or(0);
    if max == 0 {
        return Err(EngineError::Unsupported(
            "dirty rings need KVM_CAP_DIRTY_LOG_RING, which this KVM does not have".into(),
        ));
    }
    if !entries.is_power_of_two() || bytes > max {
        let most = DirtyRing::entries(max);
        return Err(EngineError::Invalid(format!("{entries} entries of a dirty ring: a power of two up to {most}")));
    }
    let mut request = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, ..Default::default() };
    request.args[0] = bytes as u64;
    fd.enable_cap(&request).map_err(|error| EngineError::system("KVM_CAP_DIRTY_LOG_RING", error))
}
