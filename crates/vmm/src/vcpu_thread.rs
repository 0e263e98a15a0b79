//! The thread of a vCPU: it runs the guest, answers its exits from the buses, and parks when it shall.

use std::time::Instant;

use parking_lot::MutexGuard;

use crate::bus::Bus;
use crate::engine::{Exit, Space, Vcpu};
use crate::exits::{ExitTable, Reason};
use crate::machine::{Event, PausedFor, Place, Processor, Shared};

/// The longest instruction (Intel SDM 2, 2.3.11).
const INSTRUCTION_MAX: usize = 15;

/// What a run led to, where it is more than an answer.
enum Outcome {
    /// Enter the guest again.
    Answered,
    /// Nothing is left to complete: look what shall be done.
    Interrupted,
    /// The guest shall have the exception of its own breakpoint instruction.
    GuestBreakpoint,
    /// Wait until the machine is resumed.
    Halted,
    /// Tell the owner, and pause the machine.
    Ended(End),
}

enum End {
    TripleFault,
    SystemEvent { kind: u32, data: Vec<u64> },
    Failed(String),
    Debug { address: u64, dr6: u64 },
}

/// What the thread of vCPU `index` does until it shall end.
pub(crate) fn run(shared: &Shared, index: usize) {
    let processor = &shared.processors[index];
    let mut vcpu = processor.vcpu.lock();
    if let Err(error) = vcpu.bind() {
        report(shared, index, &mut vcpu, End::Failed(error.to_string()));
    }
    loop {
        let may_run = shared.may_run(index);
        match step(shared, processor, &mut **vcpu) {
            Outcome::Answered | Outcome::GuestBreakpoint => {}
            // A signal of somebody else's, or a kick that has been taken back meanwhile.
            Outcome::Interrupted if may_run && shared.may_run(index) => {}
            Outcome::Interrupted => {
                vcpu.note_pause();
                if !MutexGuard::unlocked(&mut vcpu, || shared.park(index, None)) {
                    return;
                }
            }
            Outcome::Halted => {
                let goes_on = MutexGuard::unlocked(&mut vcpu, || {
                    let resumes = shared.halted(index);
                    shared.park(index, Some(resumes))
                });
                if !goes_on {
                    return;
                }
            }
            Outcome::Ended(end) => {
                report(shared, index, &mut vcpu, end);
                if !MutexGuard::unlocked(&mut vcpu, || shared.park(index, None)) {
                    return;
                }
            }
        }
    }
}

/// Runs the guest until one exit, and answers it.
fn step(shared: &Shared, processor: &Processor, vcpu: &mut dyn Vcpu) -> Outcome {
    let exits = &processor.exits;
    let entered = Instant::now();
    let result = vcpu.run();
    let left = Instant::now();
    exits.add_guest_time(left - entered);
    let left = deliver_posted(shared, exits, left);
    let exit = match result {
        Ok(exit) => exit,
        Err(error) => {
            exits.count(Reason::End, left.elapsed());
            return Outcome::Ended(End::Failed(error.to_string()));
        }
    };
    let (reason, outcome) = match exit {
        Exit::PortRead { port, width, data } => {
            read(&shared.ports, exits, Reason::PortRead, port.into(), data.chunks_mut(width.max(1)), left);
            return Outcome::Answered;
        }
        Exit::PortWrite { port, width, data } => {
            write(&shared.ports, exits, Reason::PortWrite, port.into(), data.chunks(width.max(1)), left);
            return Outcome::Answered;
        }
        Exit::Read { address, data } => {
            read(&shared.addresses, exits, Reason::MmioRead, address, [data].into_iter(), left);
            return Outcome::Answered;
        }
        Exit::Write { address, data } => {
            write(&shared.addresses, exits, Reason::MmioWrite, address, [data].into_iter(), left);
            return Outcome::Answered;
        }
        Exit::Interrupted => (Reason::Interrupted, Outcome::Interrupted),
        Exit::Halt => (Reason::Halt, Outcome::Halted),
        Exit::EndOfInterrupt { vector } => {
            shared.vm.end_of_interrupt(vector);
            (Reason::EndOfInterrupt, Outcome::Answered)
        }
        Exit::TripleFault => (Reason::End, Outcome::Ended(End::TripleFault)),
        Exit::SystemEvent { kind, data } => (Reason::End, Outcome::Ended(End::SystemEvent { kind, data })),
        Exit::Failed(why) => (Reason::End, Outcome::Ended(End::Failed(why))),
        Exit::Debug { address, instruction: true, .. } if !shared.debugger.has_breakpoint(address) => {
            (Reason::Debug, Outcome::GuestBreakpoint)
        }
        Exit::Debug { address, dr6, .. } => (Reason::Debug, Outcome::Ended(End::Debug { address, dr6 })),
    };
    let outcome = match outcome {
        Outcome::GuestBreakpoint => match vcpu.give_breakpoint() {
            Ok(()) => Outcome::Answered,
            Err(error) => Outcome::Ended(End::Failed(error.to_string())),
        },
        outcome => outcome,
    };
    exits.count(reason, left.elapsed());
    outcome
}

/// Answers reads of one port or address, one after the other.
fn read<'a>(
    bus: &Bus,
    exits: &ExitTable,
    reason: Reason,
    address: u64,
    accesses: impl Iterator<Item = &'a mut [u8]>,
    left: Instant,
) {
    let mut start = left;
    for data in accesses {
        // Looked up each time: a device may go while it answers.
        let target = bus.find(address, data.len());
        match &target {
            Some(target) => target.device.read(target.offset, data),
            None => data.fill(0xFF),
        }
        let end = Instant::now();
        exits.count_access(reason, address, target.as_ref().map_or("", |target| target.device.name()), end - start);
        start = end;
    }
}

/// Delivers writes to one port or address, one after the other.
fn write<'a>(
    bus: &Bus,
    exits: &ExitTable,
    reason: Reason,
    address: u64,
    accesses: impl Iterator<Item = &'a [u8]>,
    left: Instant,
) {
    let mut start = left;
    for data in accesses {
        let target = bus.find(address, data.len());
        if let Some(target) = &target {
            target.device.write(target.offset, data);
        }
        let end = Instant::now();
        exits.count_access(reason, address, target.as_ref().map_or("", |target| target.device.name()), end - start);
        start = end;
    }
}

/// Delivers what vCPUs have written without an exit. Returns when it was done.
fn deliver_posted(shared: &Shared, exits: &ExitTable, left: Instant) -> Instant {
    let mut end = left;
    shared.vm.take_posted(&mut |posted| {
        let bus = match posted.space() {
            Space::Ports => &shared.ports,
            Space::Addresses => &shared.addresses,
        };
        write(bus, exits, Reason::PostedWrite, posted.address(), [posted.data()].into_iter(), end);
        end = Instant::now();
    });
    end
}

/// Pauses the machine and tells its owner why, or a debugger.
fn report(shared: &Shared, index: usize, vcpu: &mut MutexGuard<'_, Box<dyn Vcpu>>, end: End) {
    let event = match end {
        End::TripleFault => Event::TripleFault { at: place(&***vcpu) },
        End::SystemEvent { kind, data } => Event::SystemEvent { kind, data },
        End::Failed(reason) => Event::Failed { reason, at: place(&***vcpu) },
        End::Debug { address, dr6 } => Event::Debug { address, dr6 },
    };
    MutexGuard::unlocked(vcpu, || {
        if shared.debugger.stopped(index, &event) {
            shared.request_pause(index, PausedFor::Debugger);
        } else {
            shared.request_pause(index, PausedFor::Owner);
            shared.owner.event(index, event);
        }
    });
}

/// Where the vCPU is.
fn place(vcpu: &dyn Vcpu) -> Place {
    let Ok(mut registers) = vcpu.registers() else { return Place::default() };
    let address = registers.cs.base.wrapping_add(registers.rip);
    let names = ["rip", "rsp", "rflags", "cr0", "cr2", "cr3", "cr4", "efer"];
    let values = names.into_iter().filter_map(|name| Some((name, *registers.number(name)?))).collect();
    let mut code = vec![0; INSTRUCTION_MAX];
    let len = vcpu.read_memory(address, &mut code);
    code.truncate(len);
    Place { address, registers: values, code }
}
