//! A vCPU of KVM.

use std::sync::Arc;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_dtable, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::Deserialize;
use serde_json::Value;

use super::cpuid;
use super::run_page::{RunKick, RunPage};
use super::vcpu_state::{self, VcpuState};
use super::vm::KvmVm;
use crate::engine::{EngineError, Exit, Kick, Registers, Segment, Table, Vcpu};

/// The longest instruction (Intel SDM 2, 2.3.11).
const INSTRUCTION_MAX: u64 = 15;

/// A vCPU's descriptor, and all that it needs to stay alive.
pub(super) struct KvmVcpu {
    pub(super) fd: VcpuFd,
    page: Arc<RunPage>,
    index: usize,
    vm: Arc<KvmVm>,
}

impl KvmVcpu {
    pub(super) fn new(kvm: &Kvm, vm: Arc<KvmVm>, index: usize, count: usize) -> Result<KvmVcpu, EngineError> {
        let system = |what: &str, error| EngineError::system(format!("{what} of vCPU {index}"), error);
        let fd = vm.fd.create_vcpu(index as u64).map_err(|error| system("KVM_CREATE_VCPU", error))?;
        let page = RunPage::map(&fd, vm.fd.run_size())
            .map_err(|error| EngineError::system(format!("mapping the shared page of vCPU {index}"), error))?;
        let leaves = cpuid::leaves(kvm, index, count, fd.get_tsc_khz().unwrap_or(0))?;
        fd.set_cpuid2(&leaves).map_err(|error| system("KVM_SET_CPUID2", error))?;
        Ok(KvmVcpu { fd, page: Arc::new(page), index, vm })
    }

    fn system(&self, what: &str, error: kvm_ioctls::Error) -> EngineError {
        EngineError::system(format!("{what} of vCPU {}", self.index), error)
    }
}

impl Vcpu for KvmVcpu {
    fn bind(&mut self) -> Result<(), EngineError> {
        self.page.bind()
    }

    fn kicker(&self) -> Box<dyn Kick> {
        Box::new(RunKick(self.page.clone()))
    }

    fn run(&mut self) -> Result<Exit<'_>, EngineError> {
        let index = self.index;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            // A signal; or a processor that waits for its start-up message has received one.
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => return Ok(Exit::Interrupted),
            Err(error) => return Err(EngineError::system(format!("KVM_RUN of vCPU {index}"), error)),
        };
        Ok(match exit {
            VcpuExit::IoIn(port, data) => Exit::PortRead { port, width: self.page.port_width(), data },
            VcpuExit::IoOut(port, data) => Exit::PortWrite { port, width: self.page.port_width(), data },
            VcpuExit::MmioRead(address, data) => Exit::Read { address, data },
            VcpuExit::MmioWrite(address, data) => Exit::Write { address, data },
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Exit::Interrupted,
            VcpuExit::Hlt => Exit::Halt,
            VcpuExit::Shutdown => Exit::TripleFault,
            VcpuExit::SystemEvent(kind, data) => Exit::SystemEvent { kind, data: data.to_vec() },
            VcpuExit::IoapicEoi(vector) => Exit::EndOfInterrupt { vector },
            VcpuExit::Debug(debug) => Exit::Debug { address: debug.pc, dr6: debug.dr6 },
            VcpuExit::InternalError => Exit::Failed(describe(self.page.internal_error())),
            VcpuExit::FailEntry(reason, cpu) => Exit::Failed(format!(
                "the host's processor {cpu} refused to enter the guest: hardware reason {reason:#x}"
            )),
            other => Exit::Failed(format!("KVM returned with an exit that nobody asked for: {other:?}")),
        })
    }

    fn registers(&self) -> Result<Registers, EngineError> {
        let regs = self.fd.get_regs().map_err(|error| self.system("KVM_GET_REGS", error))?;
        let special = self.fd.get_sregs().map_err(|error| self.system("KVM_GET_SREGS", error))?;
        Ok(Registers {
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            rsp: regs.rsp,
            rbp: regs.rbp,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            rip: regs.rip,
            rflags: regs.rflags,
            cr0: special.cr0,
            cr2: special.cr2,
            cr3: special.cr3,
            cr4: special.cr4,
            cr8: special.cr8,
            efer: special.efer,
            apic_base: special.apic_base,
            cs: from_kvm(special.cs),
            ds: from_kvm(special.ds),
            es: from_kvm(special.es),
            ss: from_kvm(special.ss),
            fs: from_kvm(special.fs),
            gs: from_kvm(special.gs),
            tr: from_kvm(special.tr),
            ldt: from_kvm(special.ldt),
            gdt: Table { base: special.gdt.base, limit: special.gdt.limit },
            idt: Table { base: special.idt.base, limit: special.idt.limit },
        })
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        let translation = self.fd.translate_gva(linear).ok()?;
        (translation.valid != 0).then_some(translation.physical_address)
    }

    fn code_at(&self, linear: u64) -> Vec<u8> {
        let slots = self.vm.slots.lock();
        (0..INSTRUCTION_MAX).map_while(|offset| slots.byte(self.translate(linear.wrapping_add(offset))?)).collect()
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), EngineError> {
        let r = registers;
        // What is not named in `Registers` (a pending interrupt) stays as it is.
        let mut special = self.fd.get_sregs().map_err(|error| self.system("KVM_GET_SREGS", error))?;
        special.cr0 = r.cr0;
        special.cr2 = r.cr2;
        special.cr3 = r.cr3;
        special.cr4 = r.cr4;
        special.cr8 = r.cr8;
        special.efer = r.efer;
        special.apic_base = r.apic_base;
        special.cs = to_kvm(r.cs);
        special.ds = to_kvm(r.ds);
        special.es = to_kvm(r.es);
        special.ss = to_kvm(r.ss);
        special.fs = to_kvm(r.fs);
        special.gs = to_kvm(r.gs);
        special.tr = to_kvm(r.tr);
        special.ldt = to_kvm(r.ldt);
        special.gdt = kvm_dtable { base: r.gdt.base, limit: r.gdt.limit, ..Default::default() };
        special.idt = kvm_dtable { base: r.idt.base, limit: r.idt.limit, ..Default::default() };
        self.fd.set_sregs(&special).map_err(|error| self.system("KVM_SET_SREGS", error))?;
        let regs = kvm_regs {
            rax: r.rax,
            rbx: r.rbx,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            rsp: r.rsp,
            rbp: r.rbp,
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rip: r.rip,
            rflags: r.rflags,
        };
        self.fd.set_regs(&regs).map_err(|error| self.system("KVM_SET_REGS", error))
    }

    fn save(&self) -> Result<Value, EngineError> {
        let state = vcpu_state::save(&self.fd, &self.vm.kept)?;
        serde_json::to_value(state)
            .map_err(|error| EngineError::Invalid(format!("saving vCPU {}: {error}", self.index)))
    }

    fn restore(&mut self, state: &Value) -> Result<(), EngineError> {
        let index = self.index;
        let state = VcpuState::deserialize(state)
            .map_err(|error| EngineError::Invalid(format!("the saved state of vCPU {index}: {error}")))?;
        vcpu_state::restore(&self.fd, &state)
    }

    fn note_pause(&mut self) {
        // Refused where the guest has no clock of KVM's, which then needs no telling.
        let _ = self.fd.kvmclock_ctrl();
    }
}

fn from_kvm(segment: kvm_segment) -> Segment {
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        kind: segment.type_,
        dpl: segment.dpl,
        present: segment.present != 0,
        l: segment.l != 0,
        db: segment.db != 0,
        s: segment.s != 0,
        g: segment.g != 0,
    }
}

fn to_kvm(segment: Segment) -> kvm_segment {
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.kind,
        present: segment.present.into(),
        dpl: segment.dpl,
        db: segment.db.into(),
        s: segment.s.into(),
        l: segment.l.into(),
        g: segment.g.into(),
        avl: 0,
        unusable: (!segment.present).into(),
        padding: 0,
    }
}

/// An internal error of KVM, in words.
fn describe((number, data): (u32, Vec<u64>)) -> String {
    match number {
        KVM_INTERNAL_ERROR_EMULATION => "KVM could not emulate an instruction".into(),
        KVM_INTERNAL_ERROR_SIMUL_EX => format!("exceptions met that KVM cannot deliver together: {data:x?}"),
        KVM_INTERNAL_ERROR_DELIVERY_EV => format!("an event could not be delivered to the guest: {data:x?}"),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            format!("the host's processor left the guest for a reason that KVM does not know: {data:x?}")
        }
        other => format!("KVM's internal error {other}: {data:x?}"),
    }
}
