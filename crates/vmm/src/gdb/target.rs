//! The machine as gdb sees it: vCPUs are threads, numbered from 1.

use std::collections::BTreeSet;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::PARK_PATIENCE;
use crate::debugger::Debugger;
use crate::engine::{Debug, EngineError, Registers, Vcpu};
use crate::machine::{Event, Machine};

/// The breakpoint instruction.
const INT3: u8 = 0xCC;
/// DR7 with all breakpoints off: its reserved bit, and exact data breakpoints (Intel SDM 3, 17.2.4).
const DR7_NONE: u64 = 1 << 10 | 1 << 9 | 1 << 8;

/// What a hardware breakpoint waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Executed,
    Accessed { kind: WatchKind, len: u64 },
}

pub(super) struct GdbTarget {
    machine: Arc<Machine>,
    hardware: Vec<(u64, When)>,
    software: BTreeSet<u64>,
    steps: BTreeSet<usize>,
    continues: BTreeSet<usize>,
    /// Only vCPUs that gdb has named go on.
    locked: bool,
}

fn tid(vcpu: usize) -> Tid {
    Tid::MIN.saturating_add(vcpu)
}

fn vcpu_of(tid: Tid) -> usize {
    tid.get() - 1
}

impl GdbTarget {
    pub(super) fn new(machine: Arc<Machine>) -> GdbTarget {
        GdbTarget {
            machine,
            hardware: Vec::new(),
            software: BTreeSet::new(),
            steps: BTreeSet::new(),
            continues: BTreeSet::new(),
            locked: false,
        }
    }

    pub(super) fn debugger(&self) -> &Debugger {
        self.machine.debugger()
    }

    pub(super) fn is_started(&self) -> bool {
        self.machine.is_started()
    }

    /// Pauses the machine; false if it does not run.
    pub(super) fn pause(&self) -> bool {
        self.machine.request_pause_for_debugger();
        self.wait_paused()
    }

    /// Waits until all vCPUs are parked; false if the machine ends.
    pub(super) fn wait_paused(&self) -> bool {
        while !self.machine.wait_paused(PARK_PATIENCE) {
            if !self.machine.is_started() {
                return false;
            }
        }
        true
    }

    /// Gives all vCPUs their breakpoints, before they go on.
    pub(super) fn prepare(&self) -> Result<(), EngineError> {
        let registers = self.registers_of_breakpoints();
        for address in self.software.iter().filter(|address| !registers.contains(&(**address, When::Executed))) {
            self.insert(*address)?;
        }
        (0..self.machine.vcpus()).try_for_each(|vcpu| {
            let debug = self.debug(vcpu, &registers);
            self.machine.with_vcpu(vcpu, |vcpu| vcpu.set_debug(&debug))
        })
    }

    /// Who has a debug register: hardware breakpoints, and as many of the others as there is room for.
    fn registers_of_breakpoints(&self) -> Vec<(u64, When)> {
        let software = self.software.iter().map(|address| (*address, When::Executed));
        self.hardware.iter().copied().chain(software).take(self.debug_registers()).collect()
    }

    fn debug_registers(&self) -> usize {
        self.with(0, |vcpu| Ok(vcpu.hardware_breakpoints())).unwrap_or(0)
    }

    /// Writes a breakpoint instruction, by the page tables of the first vCPU that has the address: an application's is not
    /// everywhere. Returns whether one has.
    fn insert(&self, address: u64) -> Result<bool, EngineError> {
        for vcpu in 0..self.machine.vcpus() {
            let mut byte = [0];
            let write = |vcpu: &mut dyn Vcpu| {
                Ok(vcpu.read_memory(address, &mut byte) == 1 && vcpu.write_memory(address, &[INT3]) == 1)
            };
            if self.with(vcpu, write)? {
                self.debugger().breakpoints().lock().insert(address, byte[0]);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Puts back all that breakpoint instructions have replaced: gdb sees memory as the guest does.
    pub(super) fn clean(&self) {
        for (address, byte) in std::mem::take(&mut *self.debugger().breakpoints().lock()) {
            for vcpu in 0..self.machine.vcpus() {
                let mut current = [0];
                let write = |vcpu: &mut dyn Vcpu| {
                    // What the guest has written there itself meanwhile stays.
                    let there = vcpu.read_memory(address, &mut current) == 1;
                    Ok(there && (current[0] != INT3 || vcpu.write_memory(address, &[byte]) == 1))
                };
                // A page that is gone took its breakpoint along.
                if self.with(vcpu, write).unwrap_or(false) {
                    break;
                }
            }
        }
    }

    /// Takes everything back and lets the guest go on.
    pub(super) fn leave(&mut self) {
        if self.pause() {
            self.clean();
            for vcpu in 0..self.machine.vcpus() {
                let _ = self.with(vcpu, |vcpu| vcpu.set_debug(&Debug::default()));
            }
        }
        self.debugger().attach(false);
        // Refused where the machine has ended.
        let _ = self.machine.resume_for_debugger(&|_| false);
    }

    fn with<T>(
        &self,
        vcpu: usize,
        act: impl FnOnce(&mut dyn Vcpu) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        self.machine.with_vcpu(vcpu, act)
    }

    fn debug(&self, vcpu: usize, registers: &[(u64, When)]) -> Debug {
        let mut addresses = [0; 4];
        let mut control = DR7_NONE;
        for (slot, (address, when)) in registers.iter().enumerate().take(addresses.len()) {
            addresses[slot] = *address;
            let (access, len) = match when {
                When::Executed => (0, 0),
                When::Accessed { kind: WatchKind::Write, len } => (1, len_bits(*len)),
                When::Accessed { len, .. } => (3, len_bits(*len)),
            };
            control |= 2 << (2 * slot) | (access | len << 2) << (16 + 4 * slot);
        }
        Debug {
            breakpoints: true,
            single_step: self.steps.contains(&vcpu),
            hardware: (!registers.is_empty()).then_some((addresses, control)),
        }
    }

    /// What gdb is told of a stop.
    pub(super) fn reason(&self, vcpu: usize, event: &Event) -> MultiThreadStopReason<u64> {
        let thread = tid(vcpu);
        match event {
            Event::Debug { address, dr6 } => {
                let registers = self.registers_of_breakpoints();
                let hit = registers.iter().enumerate().find(|(slot, _)| dr6 >> slot & 1 != 0).map(|(_, hit)| *hit);
                match hit {
                    _ if self.software.contains(address) => MultiThreadStopReason::SwBreak(thread),
                    Some((_, When::Executed)) => MultiThreadStopReason::HwBreak(thread),
                    Some((addr, When::Accessed { kind, .. })) => {
                        MultiThreadStopReason::Watch { tid: thread, kind, addr }
                    }
                    None => MultiThreadStopReason::SignalWithThread { tid: thread, signal: Signal::SIGTRAP },
                }
            }
            Event::TripleFault { .. } => {
                MultiThreadStopReason::SignalWithThread { tid: thread, signal: Signal::SIGSEGV }
            }
            Event::Failed { .. } => MultiThreadStopReason::SignalWithThread { tid: thread, signal: Signal::SIGILL },
            _ => MultiThreadStopReason::SignalWithThread { tid: thread, signal: Signal::SIGTERM },
        }
    }

    fn add_hardware(&mut self, address: u64, when: When) -> TargetResult<bool, Self> {
        if self.hardware.len() >= self.debug_registers() {
            return Ok(false);
        }
        self.hardware.push((address, when));
        Ok(true)
    }

    fn remove_hardware(&mut self, address: u64, when: When) -> TargetResult<bool, Self> {
        let at = self.hardware.iter().position(|breakpoint| *breakpoint == (address, when));
        Ok(at.map(|at| self.hardware.remove(at)).is_some())
    }
}

/// The length of a watched range as DR7 has it.
fn len_bits(len: u64) -> u64 {
    match len {
        8 => 2,
        4 => 3,
        len => len - 1,
    }
}

impl Target for GdbTarget {
    type Arch = X86_64_SSE;
    type Error = EngineError;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64_SSE, EngineError> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for GdbTarget {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = vcpu_of(tid);
        let (r, vectors) =
            self.with(vcpu, |vcpu| Ok((vcpu.registers()?, vcpu.vectors()?))).map_err(TargetError::Fatal)?;
        regs.regs = [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        regs.rip = r.rip;
        // Its upper half is reserved.
        regs.eflags = r.rflags as u32;
        let segments = &mut regs.segments;
        segments.cs = r.cs.selector.into();
        segments.ss = r.ss.selector.into();
        segments.ds = r.ds.selector.into();
        segments.es = r.es.selector.into();
        segments.fs = r.fs.selector.into();
        segments.gs = r.gs.selector.into();
        regs.st = vectors.st;
        regs.fpu.fctrl = vectors.words[0].into();
        regs.fpu.fstat = vectors.words[1].into();
        regs.fpu.ftag = vectors.words[2].into();
        regs.xmm = vectors.xmm;
        regs.mxcsr = vectors.mxcsr;
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let write = |vcpu: &mut dyn Vcpu| {
            let mut r = vcpu.registers()?;
            let general: [&mut u64; 16] = {
                let Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15, .. } =
                    &mut r;
                [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15]
            };
            general.into_iter().zip(regs.regs).for_each(|(register, value)| *register = value);
            r.rip = regs.rip;
            r.rflags = regs.eflags.into();
            // Selectors are not written: without their descriptors they would mean nothing.
            vcpu.set_registers(&r)?;
            let mut vectors = vcpu.vectors()?;
            vectors.st = regs.st;
            vectors.xmm = regs.xmm;
            vectors.mxcsr = regs.mxcsr;
            vcpu.set_vectors(&vectors)
        };
        self.with(vcpu_of(tid), write).map_err(|_| TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let read = self.with(vcpu_of(tid), |vcpu| Ok(vcpu.read_memory(start, data))).map_err(TargetError::Fatal)?;
        if read == 0 && !data.is_empty() {
            return Err(TargetError::NonFatal);
        }
        Ok(read)
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let written = self.with(vcpu_of(tid), |vcpu| Ok(vcpu.write_memory(start, data))).map_err(TargetError::Fatal)?;
        if written == data.len() { Ok(()) } else { Err(TargetError::NonFatal) }
    }

    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), EngineError> {
        (0..self.machine.vcpus()).map(tid).for_each(register);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for GdbTarget {
    fn resume(&mut self) -> Result<(), EngineError> {
        self.prepare()?;
        self.debugger().forget_stops();
        let held = |vcpu| self.locked && !self.steps.contains(&vcpu) && !self.continues.contains(&vcpu);
        self.machine.resume_for_debugger(&held)
    }

    fn clear_resume_actions(&mut self) -> Result<(), EngineError> {
        self.steps.clear();
        self.continues.clear();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), EngineError> {
        // A processor has no signals.
        self.continues.insert(vcpu_of(tid));
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for GdbTarget {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), EngineError> {
        self.steps.insert(vcpu_of(tid));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for GdbTarget {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), EngineError> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for GdbTarget {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for GdbTarget {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let readable = |vcpu| self.with(vcpu, |vcpu| Ok(vcpu.read_memory(address, &mut [0]) == 1)).unwrap_or(false);
        let room = self.hardware.len() + self.software.len() < self.debug_registers();
        if !room && !(0..self.machine.vcpus()).any(readable) {
            return Ok(false);
        }
        self.software.insert(address);
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.software.remove(&address))
    }
}

impl HwBreakpoint for GdbTarget {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.add_hardware(address, When::Executed)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.remove_hardware(address, When::Executed)
    }
}

impl HwWatchpoint for GdbTarget {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        // The processor watches 1, 2, 4 or 8 aligned bytes, and has no way to watch reads alone.
        if ![1, 2, 4, 8].contains(&len) || !address.is_multiple_of(len) || kind == WatchKind::Read {
            return Ok(false);
        }
        self.add_hardware(address, When::Accessed { kind, len })
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.remove_hardware(address, When::Accessed { kind, len })
    }
}
