//! A machine that runs: processors on threads, two buses, and who is told what happens.
//!
//! # Theory of operation
//!
//! Each vCPU is a thread ([`crate::vcpu_thread`]) that runs the guest and answers its exits. What all of them shall do is
//! one word, [`Wish`]: run, pause, or stop. Whoever changes it then kicks every vCPU; a thread looks at the word each time
//! before it enters the guest, so a kick is never lost. A thread that shall pause first completes the access it is in the
//! middle of, so that the registers of a paused vCPU are those between two instructions, and delivers what it has posted. Then it lets go of its vCPU and is
//! counted as *parked*: when all are, the machine is paused, its owner is told, and registers may be read and changed by
//! any thread until it is resumed.
//!
//! A machine is paused for its owner, or for a debugger, or for both: it runs when neither wants it to stand still. So an
//! owner's pause outlives a debugger that comes and goes, and an owner who resumes does not take a vCPU away from a debugger
//! that looks at it.
//!
//! Nothing here waits for a guest except [`Machine::wait_paused`] and [`Machine::stop`], which wait for a device's answer at
//! most.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bus::Bus;
use crate::debugger::Debugger;
use crate::engine::{EngineError, Kick, OwnedVm, Parts, Space, Vcpu, Vm};
use crate::exits::ExitTable;
use crate::vcpu_thread;

/// What the owner of a machine is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// All vCPUs are parked.
    Paused,
    /// The vCPU has executed HLT in a machine without interrupts; it goes on behind it when the machine is resumed.
    Halted,
    /// The vCPU met an exception in the handling of a double fault. The machine pauses.
    TripleFault {
        /// Where, and what is there.
        at: Place,
    },
    /// The guest told the hypervisor to shut down, to reset, or that it has crashed. The machine pauses.
    SystemEvent {
        /// What kind, in the engine's numbering.
        kind: u32,
        /// What came with it.
        data: Vec<u64>,
    },
    /// The engine cannot go on with this vCPU. The machine pauses.
    Failed {
        /// Why.
        reason: String,
        /// Where, and what is there.
        at: Place,
    },
    /// A breakpoint or a single step. The machine pauses.
    Debug {
        /// The linear address.
        address: u64,
        /// The value of DR6.
        dr6: u64,
    },
}

/// Where a vCPU was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The linear address of the next instruction.
    pub address: u64,
    /// Registers in the form `rip=0x7c00`, those that say most.
    pub registers: Vec<(&'static str, u64)>,
    /// The bytes at that address, as many as could be read.
    pub code: Vec<u8>,
}

/// Who is told.
pub trait Owner: Send + Sync {
    /// Called by vCPU threads, with nothing locked. It may ask for a pause, and must not wait for one.
    fn event(&self, vcpu: usize, event: Event);
}

/// What the vCPUs shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Wish {
    Run,
    Pause,
    Stop,
}

/// For whom a machine is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PausedFor {
    Owner,
    Debugger,
}

/// What changes when the wish does.
pub(crate) struct State {
    wish: Wish,
    for_owner: bool,
    for_debugger: bool,
    /// vCPU threads that wait.
    parked: usize,
    /// Counts resumes, for vCPUs that wait for the next one.
    resumes: u64,
}

/// One vCPU, wherever it is.
pub(crate) struct Processor {
    /// Held by its thread while it runs.
    pub(crate) vcpu: Mutex<Box<dyn Vcpu>>,
    pub(crate) kick: Box<dyn Kick>,
    pub(crate) exits: ExitTable,
    /// A debugger lets others run and not this one.
    held: AtomicBool,
}

/// What the threads share.
pub(crate) struct Shared {
    pub(crate) vm: Arc<dyn OwnedVm>,
    pub(crate) ports: Arc<Bus>,
    pub(crate) addresses: Arc<Bus>,
    pub(crate) processors: Vec<Processor>,
    pub(crate) owner: Box<dyn Owner>,
    pub(crate) debugger: Debugger,
    state: Mutex<State>,
    changed: Condvar,
    /// `State::wish`, for a look without a lock.
    wish: AtomicU8,
}

impl State {
    fn new(wish: Wish) -> State {
        State { wish, for_owner: wish == Wish::Pause, for_debugger: false, parked: 0, resumes: 0 }
    }

    fn paused_for(&mut self, who: PausedFor) -> &mut bool {
        match who {
            PausedFor::Owner => &mut self.for_owner,
            PausedFor::Debugger => &mut self.for_debugger,
        }
    }
}

impl Shared {
    /// Whether the guest may be entered on this vCPU.
    pub(crate) fn may_run(&self, vcpu: usize) -> bool {
        self.wish.load(Ordering::SeqCst) == Wish::Run as u8 && !self.processors[vcpu].held.load(Ordering::SeqCst)
    }

    fn wish(&self, state: &mut MutexGuard<'_, State>, wish: Wish) {
        state.wish = wish;
        self.wish.store(wish as u8, Ordering::SeqCst);
        for processor in &self.processors {
            let runs = wish == Wish::Run && !processor.held.load(Ordering::SeqCst);
            if runs { processor.kick.clear() } else { processor.kick.kick() }
        }
        self.changed.notify_all();
    }

    /// Asks all vCPUs to park, until `who` resumes them. The owner is told when they have.
    pub(crate) fn request_pause(&self, vcpu: usize, who: PausedFor) {
        let mut state = self.state.lock();
        if state.wish == Wish::Stop || std::mem::replace(state.paused_for(who), true) {
            return;
        }
        if state.wish == Wish::Run {
            self.wish(&mut state, Wish::Pause);
        }
        let already = state.parked == self.processors.len();
        drop(state);
        if already {
            self.owner.event(vcpu, Event::Paused);
        }
    }

    /// Tells the owner that the vCPU has halted. Returns how often the machine was resumed before that: the owner may
    /// resume it before the vCPU is parked.
    pub(crate) fn halted(&self, vcpu: usize) -> u64 {
        let resumes = self.state.lock().resumes;
        self.owner.event(vcpu, Event::Halted);
        resumes
    }

    /// Waits until the vCPU may run again; `after`: until the machine has been resumed more often than that. Its thread has
    /// let go of it. Returns false if it shall end.
    pub(crate) fn park(&self, vcpu: usize, after: Option<u64>) -> bool {
        let mut state = self.state.lock();
        state.parked += 1;
        if state.parked == self.processors.len() && state.wish == Wish::Pause {
            self.changed.notify_all();
            MutexGuard::unlocked(&mut state, || self.owner.event(vcpu, Event::Paused));
        }
        let waits = |state: &mut State| match state.wish {
            Wish::Run => after == Some(state.resumes) || self.processors[vcpu].held.load(Ordering::SeqCst),
            Wish::Pause => true,
            Wish::Stop => false,
        };
        self.changed.wait_while(&mut state, waits);
        state.parked -= 1;
        state.wish != Wish::Stop
    }
}

/// A machine's state as its engine has saved it. Memory and devices are saved by their owners.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MachineState {
    vm: Value,
    vcpus: Vec<Value>,
}

/// A machine.
pub struct Machine {
    vm: Arc<dyn OwnedVm>,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Machine {
    /// A machine of what an engine gave, before its first instruction. On its buses are the
    /// devices that the engine brings along.
    ///
    /// # Errors
    /// [`EngineError::Invalid`], if devices of the engine's overlap; [`EngineError::System`] without descriptors.
    pub fn new(parts: Parts, owner: Box<dyn Owner>) -> Result<Machine, EngineError> {
        let processors = parts
            .vcpus
            .into_iter()
            .map(|vcpu| Processor {
                kick: vcpu.kicker(),
                vcpu: Mutex::new(vcpu),
                exits: ExitTable::default(),
                held: AtomicBool::new(false),
            })
            .collect();
        let vm: Arc<dyn Vm> = parts.vm.clone();
        let shared = Shared {
            vm: parts.vm.clone(),
            ports: Arc::new(Bus::ports().posting(vm.clone(), Space::Ports)),
            addresses: Arc::new(Bus::addresses().posting(vm, Space::Addresses)),
            processors,
            owner,
            debugger: Debugger::new()?,
            state: Mutex::new(State::new(Wish::Stop)),
            changed: Condvar::new(),
            wish: AtomicU8::new(Wish::Stop as u8),
        };
        for (base, size, device) in parts.vm.devices() {
            let result = shared.addresses.insert(base, size, device);
            result.map_err(|error| EngineError::Invalid(error.to_string()))?;
        }
        Ok(Machine { vm: parts.vm, shared: Arc::new(shared), threads: Mutex::default() })
    }

    /// The machine as its owner sees it.
    pub fn owned(&self) -> &dyn OwnedVm {
        &*self.vm
    }

    /// The machine as its devices see it.
    pub fn vm(&self) -> Arc<dyn Vm> {
        self.vm.clone()
    }

    /// The bus of ports.
    pub fn ports(&self) -> &Arc<Bus> {
        &self.shared.ports
    }

    /// The bus of addresses without memory.
    pub fn addresses(&self) -> &Arc<Bus> {
        &self.shared.addresses
    }

    /// How many processors it has.
    pub fn vcpus(&self) -> usize {
        self.shared.processors.len()
    }

    /// The exits of one of its processors.
    pub fn exits(&self, vcpu: usize) -> Option<&ExitTable> {
        self.shared.processors.get(vcpu).map(|processor| &processor.exits)
    }

    /// Does something with a vCPU that does not run.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] if there is no such vCPU, or it runs.
    pub fn with_vcpu<T>(
        &self,
        vcpu: usize,
        act: impl FnOnce(&mut dyn Vcpu) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let processor = self.shared.processors.get(vcpu).ok_or_else(|| {
            EngineError::Invalid(format!("vCPU {vcpu}: the machine has 0 to {}", self.vcpus().saturating_sub(1)))
        })?;
        let mut vcpu_guard = processor.vcpu.try_lock().ok_or_else(|| {
            EngineError::Invalid(format!("vCPU {vcpu} is running: pause the machine and wait until it is paused"))
        })?;
        act(&mut **vcpu_guard)
    }

    /// The state of the engine's part of the machine, and of all vCPUs, which must be parked or not started.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn save(&self) -> Result<MachineState, EngineError> {
        // The vCPUs first: what they still hold back of an interrupt is in the controllers then.
        let vcpus = (0..self.vcpus()).map(|vcpu| self.with_vcpu(vcpu, |vcpu| vcpu.save())).collect::<Result<_, _>>()?;
        Ok(MachineState { vm: self.vm.save()?, vcpus })
    }

    /// Puts back what was saved of a machine made alike. All vCPUs must be parked or not started.
    ///
    /// # Errors
    /// [`EngineError`]; the machine is then in no state to run.
    pub fn restore(&self, state: &MachineState) -> Result<(), EngineError> {
        let (found, wanted) = (state.vcpus.len(), self.vcpus());
        if found != wanted {
            return Err(EngineError::Invalid(format!("a state of {found} vCPUs for a machine of {wanted}")));
        }
        self.vm.restore(&state.vm)?;
        for (vcpu, state) in state.vcpus.iter().enumerate() {
            self.with_vcpu(vcpu, |vcpu| vcpu.restore(state))?;
        }
        Ok(())
    }

    /// Makes the engine's part of the machine, and all vCPUs, what they are when the power is switched on. Memory and
    /// devices are the owner's affair. All vCPUs must be parked or not started.
    ///
    /// # Errors
    /// [`EngineError`]; the machine is then in no state to run.
    pub fn reset(&self) -> Result<(), EngineError> {
        let (vm, vcpus) = self.vm.power_on_state()?;
        self.restore(&MachineState { vm, vcpus })
    }

    /// Starts a thread for each vCPU, and the guest.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] if it has been started; [`EngineError::System`] if the host has no threads left.
    pub fn start(&self) -> Result<(), EngineError> {
        self.start_threads(Wish::Run)
    }

    /// Starts a thread for each vCPU, which parks: the guest begins when the machine is resumed.
    ///
    /// # Errors
    /// As [`start`](Machine::start).
    pub fn start_paused(&self) -> Result<(), EngineError> {
        self.start_threads(Wish::Pause)
    }

    /// Whether it has been started and not stopped.
    pub fn is_started(&self) -> bool {
        self.shared.state.lock().wish != Wish::Stop
    }

    /// What a debugger and the vCPU threads share.
    pub(crate) fn debugger(&self) -> &Debugger {
        &self.shared.debugger
    }

    fn start_threads(&self, wish: Wish) -> Result<(), EngineError> {
        let mut threads = self.threads.lock();
        if !threads.is_empty() {
            return Err(EngineError::Invalid("the machine has been started already".into()));
        }
        let mut state = self.shared.state.lock();
        *state = State { resumes: state.resumes, ..State::new(wish) };
        self.shared.wish(&mut state, wish);
        drop(state);
        for vcpu in 0..self.vcpus() {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name(format!("vcpu {vcpu}"));
            match thread.spawn(move || vcpu_thread::run(&shared, vcpu)) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    drop(threads);
                    self.stop();
                    return Err(EngineError::system(format!("starting the thread of vCPU {vcpu}"), error));
                }
            }
        }
        Ok(())
    }

    /// Asks all vCPUs to park, which they do before their next instruction; the owner is told when the last one has.
    pub fn request_pause(&self) {
        self.shared.request_pause(0, PausedFor::Owner);
    }

    /// The same for a debugger.
    pub(crate) fn request_pause_for_debugger(&self) {
        self.shared.request_pause(0, PausedFor::Debugger);
    }

    /// From now on it is a debugger that lets the guest go on.
    pub(crate) fn leave_to_debugger(&self) {
        self.request_pause_for_debugger();
        // Refused where it has ended.
        let _ = self.resume();
    }

    /// Whether a debugger lets the machine stand still.
    pub fn is_paused_for_debugger(&self) -> bool {
        self.shared.state.lock().for_debugger
    }

    /// Whether a debugger is attached.
    pub fn is_debugged(&self) -> bool {
        self.shared.debugger.is_attached()
    }

    /// Waits until all vCPUs are parked, at most for `patience`. Returns whether they are, as the machine shall be paused.
    pub fn wait_paused(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.state.lock();
        let all = self.vcpus();
        let waits = |state: &mut State| state.wish == Wish::Pause && state.parked < all;
        self.shared.changed.wait_while_until(&mut state, waits, deadline);
        state.wish == Wish::Pause && state.parked == all
    }

    /// Whether all vCPUs are parked, as the machine shall be paused.
    pub fn is_paused(&self) -> bool {
        self.wait_paused(Duration::ZERO)
    }

    /// Lets all vCPUs go on, those that have halted as well; but for a debugger, when that does.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] if it has not been started, or has been stopped.
    pub fn resume(&self) -> Result<(), EngineError> {
        self.resume_for(PausedFor::Owner, &mut self.shared.state.lock())
    }

    /// Lets all vCPUs go on except those that are `held`, until the next time; but for the owner, when that does. Of an
    /// end that the debugger was told first, the owner is told now, and the machine stays paused.
    pub(crate) fn resume_for_debugger(&self, held: &dyn Fn(usize) -> bool) -> Result<(), EngineError> {
        let end = self.shared.debugger.take_end();
        let mut state = self.shared.state.lock();
        for (vcpu, processor) in self.shared.processors.iter().enumerate() {
            processor.held.store(held(vcpu), Ordering::SeqCst);
        }
        if end.is_some() {
            state.for_owner = true;
        }
        self.resume_for(PausedFor::Debugger, &mut state)?;
        drop(state);
        if let Some((vcpu, event)) = end {
            self.shared.owner.event(vcpu, event);
        }
        Ok(())
    }

    fn resume_for(&self, who: PausedFor, state: &mut MutexGuard<'_, State>) -> Result<(), EngineError> {
        if state.wish == Wish::Stop {
            return Err(EngineError::Invalid("the machine is not started".into()));
        }
        *state.paused_for(who) = false;
        if !state.for_owner && !state.for_debugger {
            state.resumes += 1;
            self.shared.wish(state, Wish::Run);
        }
        Ok(())
    }

    /// Ends the threads of all vCPUs and waits for them, except for the one that calls.
    pub fn stop(&self) {
        self.shared.wish(&mut self.shared.state.lock(), Wish::Stop);
        self.shared.debugger.wake();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            if thread.thread().id() != std::thread::current().id() {
                // A thread that panicked has said so.
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}
