//! A vCPU of KVM.

use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_dtable,
    kvm_guest_debug, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::Deserialize;
use serde_json::Value;

use super::coalesced_ring::CoalescedRing;
use super::cpuid;
use super::dirty_ring::DirtyRing;
use super::run_page::{RunKick, RunPage};
use super::vcpu_state::{self, VcpuState};
use super::vm::KvmVm;
use crate::engine::{Debug, EngineError, Exit, Kick, Registers, Segment, Table, Vcpu, Vectors};

/// What a page table translates at once, at least.
const PAGE: u64 = 4096;
/// How often that is believed to be somebody else's taking of the entries.
const FULL_OF_NOTHING_MAX: u32 = 100;
/// The exception of a breakpoint instruction (Intel SDM 3, 6.15).
const BREAKPOINT_EXCEPTION: u32 = 3;

/// A vCPU's descriptor, and all that it needs to stay alive.
pub(super) struct KvmVcpu {
    pub(super) fd: VcpuFd,
    page: Arc<RunPage>,
    index: usize,
    vm: Arc<KvmVm>,
    debug: Debug,
    /// How often in a row KVM has said that the dirty ring is full, and it was empty.
    full_of_nothing: u32,
}

impl KvmVcpu {
    pub(super) fn new(kvm: &Kvm, vm: Arc<KvmVm>, index: usize, count: usize) -> Result<KvmVcpu, EngineError> {
        let system = |what: &str, error| EngineError::system(format!("{what} of vCPU {index}"), error);
        let fd = vm.fd.create_vcpu(index as u64).map_err(|error| system("KVM_CREATE_VCPU", error))?;
        let page = RunPage::map(&fd, vm.fd.run_size())
            .map_err(|error| EngineError::system(format!("mapping the shared page of vCPU {index}"), error))?;
        if index == 0 && vm.zones.addresses {
            let ring = CoalescedRing::map(&fd);
            let ring = ring.map_err(|error| EngineError::system("mapping the ring of posted writes", error))?;
            vm.posted.get_or_init(|| ring);
        }
        if let Some(entries) = vm.dirty_ring {
            let ring = DirtyRing::map(&fd, entries);
            let ring =
                ring.map_err(|error| EngineError::system(format!("mapping the dirty ring of vCPU {index}"), error))?;
            vm.rings.lock().push(ring);
        }
        let leaves = cpuid::leaves(kvm, index, count, fd.get_tsc_khz().unwrap_or(0))?;
        fd.set_cpuid2(&leaves).map_err(|error| system("KVM_SET_CPUID2", error))?;
        Ok(KvmVcpu { fd, page: Arc::new(page), index, vm, debug: Debug::default(), full_of_nothing: 0 })
    }

    fn apply_debug(&self, inject: u32) -> Result<(), EngineError> {
        let mut request = kvm_guest_debug { control: inject, ..Default::default() };
        let wants = self.debug;
        if wants != Debug::default() {
            request.control |= KVM_GUESTDBG_ENABLE;
        }
        if wants.breakpoints {
            request.control |= KVM_GUESTDBG_USE_SW_BP;
        }
        if wants.single_step {
            // Where KVM can, the step is the next instruction and not the handler of an interrupt that comes meanwhile.
            request.control |= KVM_GUESTDBG_SINGLESTEP | self.vm.kept.debug_flags & KVM_GUESTDBG_BLOCKIRQ;
        }
        if let Some((addresses, when)) = wants.hardware {
            request.control |= KVM_GUESTDBG_USE_HW_BP;
            request.arch.debugreg[..4].copy_from_slice(&addresses);
            request.arch.debugreg[7] = when;
        }
        self.fd.set_guest_debug(&request).map_err(|error| self.system("KVM_SET_GUEST_DEBUG", error))
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
        if !matches!(exit, VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) {
            self.full_of_nothing = 0;
        }
        Ok(match exit {
            VcpuExit::IoIn(port, data) => Exit::PortRead { port, width: self.page.port_width(), data },
            VcpuExit::IoOut(port, data) => Exit::PortWrite { port, width: self.page.port_width(), data },
            VcpuExit::MmioRead(address, data) => Exit::Read { address, data },
            VcpuExit::MmioWrite(address, data) => Exit::Write { address, data },
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                // Somebody else may just have taken them; but not each time.
                self.full_of_nothing = if self.vm.take_rings()? == 0 { self.full_of_nothing + 1 } else { 0 };
                if self.full_of_nothing < FULL_OF_NOTHING_MAX {
                    return Ok(Exit::Interrupted);
                }
                Exit::Failed(format!(
                    "KVM says that the dirty ring of vCPU {index} is full, and there is nothing in it: it has written more \
                     entries than the ring has, as KVMs do that emulate (docs/engine.md); log by bitmaps there"
                ))
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Exit::Interrupted,
            VcpuExit::Hlt => Exit::Halt,
            VcpuExit::Shutdown => Exit::TripleFault,
            VcpuExit::SystemEvent(kind, data) => Exit::SystemEvent { kind, data: data.to_vec() },
            VcpuExit::IoapicEoi(vector) => Exit::EndOfInterrupt { vector },
            VcpuExit::Debug(debug) => {
                let instruction = debug.exception == BREAKPOINT_EXCEPTION;
                Exit::Debug { address: debug.pc, instruction, dr6: debug.dr6 }
            }
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

    fn read_memory(&self, linear: u64, data: &mut [u8]) -> usize {
        let slots = self.vm.slots.lock();
        pieces(linear, data.len(), |address, range| {
            self.translate(address).is_some_and(|physical| slots.read(physical, &mut data[range]))
        })
    }

    fn write_memory(&mut self, linear: u64, data: &[u8]) -> usize {
        let slots = self.vm.slots.lock();
        pieces(linear, data.len(), |address, range| {
            self.translate(address).is_some_and(|physical| slots.write(physical, &data[range]))
        })
    }

    fn vectors(&self) -> Result<Vectors, EngineError> {
        let fpu = self.fd.get_fpu().map_err(|error| self.system("KVM_GET_FPU", error))?;
        let mut vectors =
            Vectors { words: [fpu.fcw, fpu.fsw, fpu.ftwx.into()], mxcsr: fpu.mxcsr, ..Vectors::default() };
        for (to, from) in vectors.st.iter_mut().zip(fpu.fpr) {
            to.copy_from_slice(&from[..10]);
        }
        vectors.xmm = fpu.xmm.map(u128::from_le_bytes);
        Ok(vectors)
    }

    fn set_vectors(&mut self, vectors: &Vectors) -> Result<(), EngineError> {
        let mut fpu = self.fd.get_fpu().map_err(|error| self.system("KVM_GET_FPU", error))?;
        for (to, from) in fpu.fpr.iter_mut().zip(vectors.st) {
            to[..10].copy_from_slice(&from);
        }
        [fpu.fcw, fpu.fsw] = [vectors.words[0], vectors.words[1]];
        fpu.ftwx = vectors.words[2] as u8;
        fpu.xmm = vectors.xmm.map(u128::to_le_bytes);
        fpu.mxcsr = vectors.mxcsr;
        self.fd.set_fpu(&fpu).map_err(|error| self.system("KVM_SET_FPU", error))
    }

    fn hardware_breakpoints(&self) -> usize {
        self.vm.kept.hardware_breakpoints
    }

    fn set_debug(&mut self, debug: &Debug) -> Result<(), EngineError> {
        self.debug = *debug;
        self.apply_debug(0)
    }

    fn give_breakpoint(&mut self) -> Result<(), EngineError> {
        self.apply_debug(KVM_GUESTDBG_INJECT_BP)
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

/// Does something to each piece of `len` bytes at a linear address that lies in one page, until it fails. Returns for how
/// many bytes it was done.
fn pieces(linear: u64, len: usize, mut act: impl FnMut(u64, Range<usize>) -> bool) -> usize {
    let mut done = 0;
    while done < len {
        let address = linear.wrapping_add(done as u64);
        let now = (len - done).min((PAGE - address % PAGE) as usize);
        if !act(address, done..done + now) {
            break;
        }
        done += now;
    }
    done
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
